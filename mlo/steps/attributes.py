"""Attributes that the evaluation of a loss changes: a later evaluation would see them, but nothing puts them back."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mlo.errors import GraphError

if TYPE_CHECKING:
    from mlo.steps.level import Level

_CONTAINERS = (list, dict, set, deque)
_PLAIN = (int, float, complex, str, bytes, type(None))
#: of every module and problem; a problem's own change in each evaluation
_KNOWN = frozenset(vars(nn.Module())) | {"step_number", "substitute", "asks_steps_taken", "asks_total"}


class Attributes:
    """The attributes of the problems and modules that a loss uses, as they are now, other than parameters and buffers.

    Attributes:
        hooked: whether a module has forward hooks, which may change what is no attribute.
    """

    def __init__(self, level: Level) -> None:
        problems = [level.problem, *[read.problem for read in level.reads.values()]]
        self._level = level
        self._held: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = []
        self.hooked = False
        for problem in problems:
            self._note(f"problem {problem.name!r}", vars(problem))
            for path, part in problem.module.named_modules():
                where = f"{path!r} of the module" if path else "the module"
                self._note(f"{where} of {problem.name!r}", vars(part))
                self.hooked |= bool(part._forward_hooks or part._forward_pre_hooks)

    def _note(self, whose: str, attributes: dict[str, Any]) -> None:
        own = {key: value for key, value in attributes.items() if key not in _KNOWN}
        copies = {k: v.copy() for k, v in own.items() if isinstance(v, _CONTAINERS)}
        self._held.append((whose, attributes, own | copies, {key: _mark(value) for key, value in own.items()}))

    def changed(self) -> list[str]:
        """Which have changed since."""
        found = []
        for whose, attributes, _, marks in self._held:
            found += [f"{key!r} of {whose}" for key in _changed(attributes, marks)]
        return found

    def check(self, first: Tensor, second: Tensor) -> None:
        """Raise a GraphError if two losses, at the same parameters and of the same batch, differ.

        Attributes then are what they were, but tensors that were written into stay so.
        """
        if not first.is_floating_point() or torch.allclose(
            first, second, rtol=torch.finfo(first.dtype).eps ** 0.5, atol=0.0, equal_nan=True
        ):
            return
        names = self.changed()
        for _, attributes, values, marks in self._held:
            for key in [*_changed(attributes, marks)]:
                if key not in values:
                    del attributes[key]
                elif isinstance(attributes.get(key), _CONTAINERS) and _same_object(attributes[key], marks[key]):
                    _refill(attributes[key], values[key])
                else:
                    attributes[key] = values[key]
        what = f"it changes {', '.join(names)}" if names else "a forward hook may count its calls"
        raise GraphError(
            f"problem {self._level.name!r}: its loss has another value when it is evaluated again at the same "
            f"parameters, with the same batch and random numbers: {what}. Steps are evaluated several times, so this "
            "must not change a loss; keep the value in a buffer (register_buffer), or compute it from "
            "self.steps_taken. If a first call sets values, run the module once before the engine is made. Draw random "
            "numbers from the global generators"
        )


def _changed(attributes: Mapping[str, Any], marks: Mapping[str, Any]) -> Iterator[str]:
    for key in [*marks, *[key for key in attributes if key not in _KNOWN and key not in marks]]:
        if key not in attributes or key not in marks or _mark(attributes[key]) != marks[key]:
            yield key


def _mark(value: Any, inside: bool = True) -> Any:
    """What differs between an attribute before and after a change."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, torch.Generator):
        return id(value), value.get_state().tolist()
    if isinstance(value, random.Random):
        return id(value), value.getstate()
    if isinstance(value, np.random.Generator):
        return id(value), str(value.bit_generator.state)
    if inside and isinstance(value, _CONTAINERS):
        members = value.items() if isinstance(value, dict) else value
        marks = [tuple(_mark(x, False) for x in m) if isinstance(m, tuple) else _mark(m, False) for m in members]
        return id(value), marks
    return id(value)


def _same_object(value: Any, mark: Any) -> bool:
    return isinstance(mark, tuple) and mark[0] == id(value)


def _refill(container: Any, values: Any) -> None:
    container.clear()
    (container.update if isinstance(container, dict | set) else container.extend)(values)
