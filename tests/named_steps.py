"""Optimizer steps of problems by the names of their parameters, for tests that write them so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mlo
from mlo.levels.state import State, cast, slots_on
from mlo.steps.optimizer import Groups, differentiable_step, hyperparameters, transpose_step, virtual_step

Named = Mapping[str, Tensor]


@dataclass
class OptimizerState:
    """Hyperparameters, and copies of the slots of each variable that has some."""

    groups: Groups
    slots: dict[str, dict[str, Any]]


@dataclass
class Pulled:
    gradient: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]
    slots: dict[str, Mapping[str, Tensor]]


def optimizer_state(problem: mlo.Problem) -> OptimizerState:
    slots = {
        name: {k: v.clone() if isinstance(v, Tensor) else v for k, v in slot.items()}
        for name, slot in zip(problem.variables, problem.optimizer_slots(), strict=True)
        if slot
    }
    return OptimizerState(hyperparameters(problem), slots)


def recast(at: OptimizerState, dtype: torch.dtype) -> OptimizerState:
    slots = cast(State((), slots=tuple(at.slots.values())), dtype).slots
    return OptimizerState(at.groups, dict(zip(at.slots, map(dict, slots), strict=True)))


def moved_to(at: OptimizerState, device: torch.device) -> OptimizerState:
    slots = slots_on(tuple(at.slots.values()), device)
    return OptimizerState(at.groups, dict(zip(at.slots, map(dict, slots), strict=True)))


def step(problem: mlo.Problem, parameters: Named, gradients: Mapping[str, Tensor | None], at: OptimizerState):
    """(the variables after a virtual step, the optimizer's state after it)."""
    return _taken(virtual_step, problem, parameters, gradients, at)


def step_with_graph(problem: mlo.Problem, parameters: Named, gradients: Mapping[str, Any], at: OptimizerState):
    """The same, with a graph."""
    return _taken(differentiable_step, problem, parameters, gradients, at)


def pull(
    problem: mlo.Problem,
    parameters: Named,
    gradients: Mapping[str, Tensor | None],
    at: OptimizerState,
    cotangent: tuple[Tensor, ...],
    slots: Mapping[str, Named] | None = None,
) -> Pulled:
    """The transposed step; the cotangents of slots by name."""
    names = list(problem.variables)
    given = None if slots is None else tuple(slots.get(name, {}) for name in names)
    by_position = [gradients[name] for name in names]
    done = transpose_step(problem, _state(problem, parameters, at), by_position, at.groups, cotangent, given)
    return Pulled(done.gradient, done.variables, dict(zip(names, done.slots, strict=False)))


def _state(problem: mlo.Problem, parameters: Named, at: OptimizerState) -> State:
    names = list(problem.variables)
    return State(tuple(parameters[n] for n in names), slots=tuple(at.slots.get(n, {}) for n in names))


def _taken(take: Any, problem: mlo.Problem, parameters: Named, gradients: Mapping[str, Any], at: OptimizerState):
    names = list(problem.variables)
    after = take(problem, _state(problem, parameters, at), [gradients[name] for name in names], at.groups)
    slots = {name: dict(slot) for name, slot in zip(names, after.slots, strict=True) if slot}
    return dict(zip(names, after.variables, strict=True)), OptimizerState(at.groups, slots)
