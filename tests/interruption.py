"""Something that happens before each step of an engine, such as a power cut."""

from __future__ import annotations

from collections.abc import Callable

import mlo


class PowerCutError(Exception):
    """What the power cut of these tests raises."""


def before_each_step(engine: mlo.Engine, happens: Callable[[int], None]) -> mlo.Engine:
    """Let ``happens(rounds)`` be called before each step of the engine, with the number of rounds before it."""
    step = engine.step

    def stepped() -> None:
        happens(engine.rounds)
        step()

    engine.step = stepped
    return engine
