"""Steps by the formulas of :mod:`mlo.steps.adaptive`: variables by position, gathered by parameter group.

As in torch, a complex variable steps like two real ones, its real and its imaginary part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mlo.levels.state import State
from mlo.ops.vectors import as_like, chunks, real
from mlo.steps import adaptive
from mlo.steps.adaptive import Formula, Part

Group = Mapping[str, Any]
Gradients = Sequence[Tensor | None]
# of gradients, of variables and of slots
Cotangents = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Mapping[str, Tensor]]]


def step(
    formula: Formula, groups: Sequence[Group], numbers: Sequence[int], state: State, gradients: Gradients
) -> tuple[list[Tensor], list[Mapping[str, Any]]]:
    """The variables and the optimizer's slots after one step.

    Args:
        groups: the hyperparameters of each parameter group.
        numbers: the group of each variable.
    """
    moved, after = [*state.variables], [*state.slots]
    for part in _parts(formula, groups, numbers, state, gradients, stepped=False):
        stepped, reached = adaptive.step(formula, part)
        counters = {count: torch.tensor(count, dtype=_counter_dtype()) for count in set(part.counts)}
        for row, (index, count) in enumerate(zip(part.indices, part.counts, strict=True)):
            like = state.variables[index]
            moved[index] = as_like(like, stepped[row])
            slots = {key: as_like(like, tensors[row]) for key, tensors in reached.items()}
            after[index] = {"step": counters[count], **slots}
    return [t.clone() if t is v else t for t, v in zip(moved, state.variables, strict=True)], after


def transpose(
    formula: Formula,
    groups: Sequence[Group],
    numbers: Sequence[int],
    state: State,
    gradients: Gradients,
    stepped: bool,
    cotangents: Sequence[Tensor],
    of_slots: Sequence[Mapping[str, Tensor]] | None,
) -> Cotangents:
    """Cotangents of gradients, variables and slots before a step, from those of variables and slots after it.

    Args:
        state: before the step; its slots are those after it, if ``stepped``.
        of_slots: None: only the cotangents of the gradients are computed.
    """
    to_gradients: list[Any] = [
        torch.zeros_like(c) if g is None else g for c, g in zip(cotangents, gradients, strict=True)
    ]
    to_variables = [*cotangents]
    to_slots = [dict(given) for given in of_slots or ()]
    for part in _parts(formula, groups, numbers, state, gradients, stepped):
        given = [real(cotangents[index]) for index in part.indices]
        after = None if of_slots is None else _gathered(of_slots, part, given)
        reached: adaptive.State = part.state if stepped else adaptive.reached(formula, part)
        found, before, of_state = adaptive.transpose(formula, part, reached, given, after)
        for row, index in enumerate(part.indices):
            like = cotangents[index]
            to_gradients[index] = as_like(like, found[row])
            if of_slots is not None:
                to_variables[index] = as_like(like, before[row])
                # before the first step there is no state to pass anything on to
                began = bool(state.slots[index])
                to_slots[index] = {k: as_like(like, tensors[row]) for k, tensors in of_state.items()} if began else {}
    return to_gradients, to_variables, to_slots


def _gathered(of_slots: Sequence[Mapping[str, Tensor]], part: Part, like: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """The cotangents of each kind of slot that one of the variables has, with zeros for the others."""
    given = [of_slots[index] for index in part.indices]
    return {
        key: [real(s[key]) if key in s else torch.zeros_like(shape) for s, shape in zip(given, like, strict=True)]
        for key in part.state
        if any([key in slot for slot in given])
    }


def _parts(
    formula: Formula,
    groups: Sequence[Group],
    numbers: Sequence[int],
    state: State,
    gradients: Gradients,
    stepped: bool,
) -> Iterator[Part]:
    variables, slots = state.variables, state.slots
    counters = {id(slot["step"]): slot["step"] for slot in slots if slot}
    values = dict(zip(counters, torch.stack([*counters.values()]).tolist(), strict=True)) if counters else {}
    for number, group in enumerate(groups):
        found = [i for i, g in enumerate(gradients) if g is not None and numbers[i] == number]
        for indices in chunks(found, variables):
            kept = {
                key: [real(slots[i][key] if slots[i] else torch.zeros_like(variables[i])) for i in indices]
                for key in formula.begin(group)
            }
            taken = [values[id(slots[i]["step"])] if slots[i] else 0.0 for i in indices]
            # a step that was undone, for it was not finite, has not been counted
            counts = [max(1.0, count + (not stepped)) for count in taken]
            own = [real(gradient) for i in indices if (gradient := gradients[i]) is not None]
            yield Part(group, indices, counts, [real(variables[i]) for i in indices], own, kept)


def _counter_dtype() -> torch.dtype:
    """As torch.optim has it."""
    return torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32
