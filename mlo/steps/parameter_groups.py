"""Steps by formulas, for problems: variables by name, gathered by parameter group for :mod:`mlo.steps.adaptive`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mlo.levels.problem import Problem
from mlo.steps import adaptive, sgd
from mlo.steps.adaptive import Formula, Part
from mlo.steps.optimizer_state import OptimizerState

Tensors = Mapping[str, Tensor]
Gradients = Mapping[str, Tensor | None]
Slots = Mapping[str, Mapping[str, Tensor]]
# of gradients, of variables and of slots
NamedCotangents = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, dict[str, Tensor]]]


def step(
    problem: Problem, formula: Formula, parameters: Tensors, gradients: Gradients, optimizer_state: OptimizerState
) -> tuple[dict[str, Tensor], OptimizerState]:
    """The variables and the optimizer state after one step."""
    moved = {name: parameters[name] for name in problem.variables}
    slots = dict(optimizer_state.slots)
    for part in _parts(problem, formula, parameters, gradients, optimizer_state):
        stepped, state = adaptive.step(formula, part)
        moved.update(zip(part.names, stepped, strict=True))
        counters = {count: torch.tensor(count, dtype=_counter_dtype()) for count in set(part.counts)}
        for index, (name, count) in enumerate(zip(part.names, part.counts, strict=True)):
            slots[name] = {"step": counters[count], **{key: tensors[index] for key, tensors in state.items()}}
    moved = {name: tensor.clone() if tensor is parameters[name] else tensor for name, tensor in moved.items()}
    return moved, OptimizerState(optimizer_state.groups, slots)


def transpose(
    problem: Problem,
    formula: Formula,
    parameters: Tensors,
    gradients: Gradients,
    optimizer_state: OptimizerState,
    cotangent: Tensors,
    slots: Slots | None,
) -> NamedCotangents:
    """Cotangents of gradients, variables and slots before a step, from those of variables and slots after it.

    Without ``slots``, only those of the gradients.
    """
    to_gradients = {name: torch.zeros_like(c) for name, c in cotangent.items() if gradients[name] is None}
    to_parameters = dict(cotangent)
    to_slots = {name: dict(slot) for name, slot in (slots or {}).items()}
    for part in _parts(problem, formula, parameters, gradients, optimizer_state):
        after = None if slots is None else _gathered(slots, part, cotangent)
        given = [cotangent[name] for name in part.names]
        reached: adaptive.State = part.state
        if not optimizer_state.stepped:
            reached = adaptive.reached(formula, part)
        found, before, state = adaptive.transpose(formula, part, reached, given, after)
        to_gradients.update(zip(part.names, found, strict=True))
        to_parameters.update(zip(part.names, before, strict=False))
        for index, name in enumerate(part.names):  # before the first step there is no state to pass anything on to
            held = name not in optimizer_state.slots
            to_slots[name] = {} if held else {key: tensors[index] for key, tensors in state.items()}
    return to_gradients, to_parameters, to_slots


def _gathered(slots: Slots, part: Part, like: Tensors) -> dict[str, list[Tensor]]:
    """The slots of each kind that one of the variables has, with zeros for the others."""
    return {
        key: [slots[n][key] if key in slots.get(n, {}) else torch.zeros_like(like[n]) for n in part.names]
        for key in part.state
        if any(key in slots.get(name, {}) for name in part.names)
    }


def _parts(
    problem: Problem, formula: Formula, parameters: Tensors, gradients: Gradients, optimizer_state: OptimizerState
) -> Iterator[Part]:
    numbers, slots = sgd.group_numbers(problem), optimizer_state.slots
    for number, group in enumerate(optimizer_state.groups):
        found = {n: g for n, g in gradients.items() if g is not None and numbers[n] == number}
        if not found:
            continue
        names = list(found)
        state = {
            key: [slots[n][key] if n in slots else torch.zeros_like(parameters[n]) for n in names]
            for key in formula.begin(group)
        }
        counters = {id(c): c for n in names if (c := slots.get(n, {}).get("step")) is not None}
        values = dict(zip(counters, torch.stack([*counters.values()]).tolist(), strict=True)) if counters else {}
        taken = [values.get(id(slots.get(n, {}).get("step")), 0.0) for n in names]
        # a step that was undone, for it was not finite, has not been counted
        counts = [max(1.0, count + (not optimizer_state.stepped)) for count in taken]
        yield Part(group, names, counts, [parameters[n] for n in names], list(found.values()), state)


def _counter_dtype() -> torch.dtype:
    """As torch.optim has it."""
    return torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32
