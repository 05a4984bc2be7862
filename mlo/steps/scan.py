"""Several steps of a level one after another, in one graph: recorded as one, or taken again as part of a loss."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlo.levels.problem import Problem
from mlo.levels.state import State, copied
from mlo.ops.differentiable import TwiceDifferentiable
from mlo.ops.vectors import Vector, dense, filled
from mlo.steps.evaluation import evaluate
from mlo.steps.level import Level
from mlo.steps.losses import Found, Reading, States, loss_at, loss_of
from mlo.steps.optimizer import Groups, differentiable_step, sgd_step

if TYPE_CHECKING:
    from mlo.steps.step import Step

#: the loss of the step of this number from a state, with its graph; what it is differentiated for; the buffers after it
LossOfStep = Callable[[int, State], tuple[Tensor, Vector, Vector]]


def scan(
    level: Level,
    state: State,
    groups: Sequence[Groups],
    loss_of_step: LossOfStep,
    take: Callable[[Problem, State, Found, Groups], State] = differentiable_step,
) -> tuple[State, bool]:
    """The state that steps lead to, with the graph of all of them.

    Args:
        groups: the optimizer's hyperparameters at each step.
        take: one step of the optimizer.

    Returns:
        The state, and whether each loss reached a variable.
    """
    reached = True
    for index, at in enumerate(groups):
        loss, inputs, buffers = loss_of_step(index, state)
        found: Found = [None] * len(inputs)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
        reached = reached and any([gradient is not None for gradient in found])
        state = take(level.problem, state._replace(buffers=buffers), found, at)
    return state, reached


def steps_of(
    level: Level, states: States, batches: Sequence[Any], groups: Groups, reached: Collection[str], counts: bool
) -> tuple[Vector, State, bool, list[Tensor], list[int]]:
    """Several steps on one batch each, as a function of tensors: what is run, and what is compiled.

    Args:
        states: of the level, with its optimizer's slots, and of what it reads.
        groups: the hyperparameters of all steps.
        reached: problems that the losses are differentiated for.
        counts: whether the loss sees the number of the step.

    Returns:
        The variables and the state after the last step, whether each loss reached a variable, the losses, and the
        numbers of calls.
    """
    losses: list[Tensor] = []
    own_calls = 0

    def loss_of_step(index: int, state: State) -> tuple[Tensor, Vector, Vector]:
        nonlocal own_calls
        loss, own = loss_at(level, state, batches[index])
        losses.append(loss.detach())
        own_calls += own.calls
        if counts:
            level.problem.step_number += 1
        return loss, state.variables, own.buffers

    with Reading(level, states, reached) as reading:
        end, each = scan(level, states[level.name], [groups] * len(batches), loss_of_step, sgd_step)
    return end.variables, end, each, losses, reading.calls(own_calls)


@dataclass(frozen=True)
class Joined:
    """Steps that were taken in one graph, whose backward is their pullback.

    Attributes:
        start, end: before the first step, where the graph begins, and after the last one.
        losses: of each step, detached.
    """

    start: State
    end: State
    losses: Sequence[Tensor]

    def pull(
        self, cotangent: Vector, slots: Sequence[Mapping[str, Tensor]], onto: Sequence[Tensor], oldest: bool
    ) -> tuple[Vector, Sequence[Mapping[str, Tensor]], Found]:
        """From the cotangents of what the steps led to, to those of what they began with and of the tensors ``onto``.

        Args:
            oldest: whether nothing before the first step is needed.
        """
        pairs = [*zip(self.end.variables, cotangent, strict=True)]
        pairs += [(self.end.slots[i][key], c) for i, slot in enumerate(slots) for key, c in slot.items()]
        ends, given = zip(*((end, c) for end, c in pairs if end.requires_grad), strict=True)
        start = () if oldest else self.start.variables
        keys = [] if oldest else [(i, k) for i, s in enumerate(self.start.slots) for k, v in s.items() if v is not None]
        inputs = [*start, *[self.start.slots[i][k] for i, k in keys], *onto]
        # the same steps may be pulled back for several upper problems
        found = dense(torch.autograd.grad(ends, inputs, given, retain_graph=True, allow_unused=True))
        before: list[dict[str, Tensor]] = [{} for _ in cotangent]
        for (index, key), of_slot in zip(keys, found[len(start) :], strict=False):
            if of_slot is not None:
                before[index][key] = of_slot
        return filled(found[: len(start)], start), before, found[len(start) + len(keys) :]


def retaken(
    inner: Mapping[str, Sequence[Step]], states: States, lower: States, shifts: Mapping[str, Vector]
) -> dict[str, State]:
    """Where the recorded steps of lower levels lead when they are taken again under ``states``, with their graphs.

    Args:
        inner: {level: its steps}, lowest first.
        states: of the level whose loss these steps are part of, and of those above it. What lies between is read as it
            was recorded, before its own steps.
        lower: of those below, after the steps that they took before.
        shifts: {level: what is added to its variables as the steps had read them}; these are read instead of those in
            ``states``.
    """
    reached = dict(lower)
    for name, steps in inner.items():
        reached[name] = _retaken(steps, states, reached, shifts)
    return {name: reached[name] for name in inner}


def _retaken(steps: Sequence[Step], states: States, lower: States, shifts: Mapping[str, Vector]) -> State:
    """Where the recorded steps of one level lead."""
    level = steps[0].point.level
    read_from = {**states, **{read: state for read, state in lower.items() if read in level.below}}

    def loss_of_step(index: int, state: State) -> tuple[Tensor, Vector, Vector]:
        point = steps[index].point
        own, inputs, further = state, state.variables, shifts
        if point.apart:
            own, inputs = shifted(state)
            further = {**shifts, level.name: inputs}
        reads = {read: read_from.get(read, there) for read, there in point.reads.items()}
        reads |= {read: _moved(point.reads[read], by) for read, by in shifts.items() if read in reads}
        losses, buffers = [], state.buffers
        for micro in point.micro:
            at = {**reads, level.name: own._replace(buffers=buffers)}
            if point.inner:
                at |= retaken(point.inner, {**states, level.name: at[level.name]}, lower, further)
            with TwiceDifferentiable(elementary=True):
                loss, buffers, _ = evaluate(
                    loss_of,
                    level,
                    at,
                    micro,
                    at.keys() - set(level.problem.node.held),
                    kind="product",
                    count=point.step_number,
                    autocast=level.problem.autocast is not torch.float16,  # whose gradients would vanish
                )
            losses.append(loss)
        return torch.stack(losses).mean(), inputs, buffers

    first = steps[0].point.state
    if first.device != level.device:  # it may be stored on the CPU
        first = copied(first, level.device)
    start = first._replace(variables=tuple([v.detach().requires_grad_() for v in first.variables]), live=False)
    return scan(level, start, [step.groups for step in steps], loss_of_step)[0]


def shifted(state: State, shift: Vector | None = None) -> tuple[State, Vector]:
    """The state with ``shift`` (None: zeros that require gradients) added to its variables, and the shift."""
    if shift is None:
        shift = tuple([torch.zeros_like(variable).requires_grad_() for variable in state.variables])
    return _moved(state, shift), shift


def _moved(state: State, shift: Vector) -> State:
    return state._replace(variables=tuple(map(torch.add, state.variables, shift)), live=False)
