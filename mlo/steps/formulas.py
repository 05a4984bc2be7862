"""Steps by formulas, for problems: variables by name, gathered by parameter group for :mod:`mlo.steps.adaptive`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mlo.levels.problem import Problem
from mlo.steps import adaptive, sgd
from mlo.steps.adaptive import Formula, Group
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
        stepped, state = adaptive.step(formula, part.group, part.counts, part.parameters, part.gradients, part.state)
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
    slots: Slots,
) -> NamedCotangents:
    """Cotangents of gradients, variables and slots before a step, from those of variables and slots after it."""
    to_gradients = {name: torch.zeros_like(c) for name, c in cotangent.items() if gradients[name] is None}
    to_parameters, to_slots = dict(cotangent), {name: dict(slot) for name, slot in slots.items()}
    for part in _parts(problem, formula, parameters, gradients, optimizer_state):
        after = {
            key: [slots[n][key] if key in slots.get(n, {}) else torch.zeros_like(cotangent[n]) for n in part.names]
            for key in part.state
            if any(key in slots.get(name, {}) for name in part.names)
        }
        given = [cotangent[name] for name in part.names]
        found, before, state = adaptive.transpose(
            formula, part.group, part.counts, part.parameters, part.gradients, part.state, given, after
        )
        to_gradients.update(zip(part.names, found, strict=True))
        to_parameters.update(zip(part.names, before, strict=True))
        for index, name in enumerate(part.names):  # before the first step there is no state to pass anything on to
            held = name not in optimizer_state.slots
            to_slots[name] = {} if held else {key: tensors[index] for key, tensors in state.items()}
    return to_gradients, to_parameters, to_slots


@dataclass(frozen=True)
class _Part:
    """The variables of one parameter group that have a gradient; ``counts`` are their steps, this one included."""

    group: Group
    names: list[str]
    counts: list[float]
    parameters: list[Tensor]
    gradients: list[Tensor]
    state: dict[str, list[Tensor]]


def _parts(
    problem: Problem, formula: Formula, parameters: Tensors, gradients: Gradients, optimizer_state: OptimizerState
) -> Iterator[_Part]:
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
        counts = [1.0 + values.get(id(slots.get(n, {}).get("step")), 0.0) for n in names]
        yield _Part(group, names, counts, [parameters[n] for n in names], list(found.values()), state)


def _counter_dtype() -> torch.dtype:
    """As torch.optim has it."""
    return torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32
