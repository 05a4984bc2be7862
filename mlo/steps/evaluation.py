"""One evaluation of a loss, with its random numbers, step count and autocast; its passes are counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlo.errors import ConfigError
from mlo.levels.state import State
from mlo.ops.autocast import lowered
from mlo.ops.rng import Randomness, outside_state, replay
from mlo.ops.vectors import Vector
from mlo.steps.level import Level


class MicroBatch(NamedTuple):
    """What one evaluation of a step is taken on; a step has several where gradients are accumulated.

    Attributes:
        batch: as the problem's data gave it.
        randomness: the random state that it draws from; None: the present one, for an evaluation that was not yet made.
        buffers: the module's before it, as the micro-batch before it left them; None for the first of a step.
        scale: what the loss is multiplied by while its gradient is taken.
    """

    batch: Any
    randomness: Randomness | None = None
    buffers: Vector | None = None
    scale: float = 1.0


def evaluate(
    run: Callable[..., tuple[Any, ...]],
    level: Level,
    states: Mapping[str, State],
    micro: MicroBatch,
    *arguments: Any,
    kind: str,
    count: int,
    autocast: bool,
    twice: bool = False,
    **options: Any,
) -> tuple[Any, ...]:
    """Run a function of :mod:`mlo.steps.losses`, or what is compiled from it, and count its passes.

    Args:
        run: takes the level, ``states``, the batch, the ``arguments`` and ``options``; what it returns ends with the
            number of calls of each module.
        kind: what the passes are counted as.
        count: how many steps the problem had taken before.
        autocast: whether to evaluate under the problem's autocast, if it has one.
        twice: whether the result will be differentiated again.
    """
    second = twice or kind == "product"
    problem, dtype = level.problem, level.problem.autocast if autocast else None
    outside = outside_state() if level.draws_outside and micro.randomness is None else None
    before, problem.step_number = problem.step_number, count
    try:
        with (
            nullcontext() if micro.randomness is None else replay(micro.randomness, level.device),
            nullcontext() if second else level.tf32.in_step(),
        ):
            if dtype is not None:
                options["context"] = lowered(level.device.type, dtype)
            done = run(level, states, micro.batch, *arguments, **options)
    except (TypeError, ValueError) as error:
        if micro.batch is None:
            error.add_note(f"(problem {level.name!r} was given no data, so the batch of its loss is None)")
        elif isinstance(micro.batch, Tensor):
            hint = (
                f"the batch of problem {level.name!r} is a tensor of shape {tuple(micro.batch.shape)}, since each item "
                "of its data is one batch; write data=[(x, y)] for one batch of two tensors"
            )
            if "values to unpack" in str(error):
                raise ConfigError(f"the loss of problem {level.name!r} raised {error!r}: {hint}") from error
            error.add_note(f"({hint})")
        raise
    except torch.OutOfMemoryError as error:
        error.add_note(f"Memory ran out in an evaluation of the loss of problem {level.name!r}.")
        raise
    finally:
        problem.step_number = before
    level.count(kind, done[-1])
    if outside is not None:
        level.note_draws(outside)
    return done
