"""The state of an optimizer as a value: hyperparameters of each group, and the tensors of each parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlo.levels.problem import Problem

# scalars in optimizer states that depend only on the number of steps
COUNTERS = frozenset(("step", "mu_product", "eta", "mu"))


@dataclass(frozen=True)
class OptimizerState:
    """The state of a problem's optimizer before or after a step.

    Attributes:
        groups: the hyperparameters of each parameter group, with the learning rates that schedulers have set.
        slots: {parameter name: {key: value}}, the optimizer's state of each parameter, such as its momentum buffer.
    """

    groups: tuple[Mapping[str, Any], ...]
    slots: Mapping[str, Mapping[str, Any]]


def optimizer_state(problem: Problem, copies: bool = True) -> OptimizerState:
    """The current state of the problem's optimizer; its slots are copies, or the live tensors if not ``copies``."""
    optimizer = problem.optimizer
    groups = tuple({k: copied(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups)
    slots = {
        name: {key: copied(value) if copies else value for key, value in optimizer.state[parameter].items()}
        for name, parameter in problem.variables.items()
        if parameter in optimizer.state
    }
    return OptimizerState(groups, slots)


def without_values(state: OptimizerState) -> OptimizerState:
    """The same hyperparameters, and an empty tensor in each slot, for where only the presence of slots matters."""
    slots = {
        name: {key: value.new_empty(0) if isinstance(value, Tensor) else value for key, value in slot.items()}
        for name, slot in state.slots.items()
    }
    return OptimizerState(state.groups, slots)


def moved_optimizer_state(optimizer_state: OptimizerState, device: torch.device | None) -> OptimizerState:
    """A copy on another device; counters stay on theirs."""
    slots = {
        name: {
            key: value.to(device) if isinstance(value, Tensor) and key not in COUNTERS else value
            for key, value in s.items()
        }
        for name, s in optimizer_state.slots.items()
    }
    return OptimizerState(optimizer_state.groups, slots)


def copied(value: Any) -> Any:
    """A copy of a tensor; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) else value
