"""Virtual steps of lower problems: computed from states to new states and records, without side effects."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mlo.hypergradient.step import Record
from mlo.levels.problem import Problem, State
from mlo.ops.rng import replay
from mlo.steps.evaluation import Evaluator
from mlo.steps.gradient_functions import MicroBatch
from mlo.steps.optimizer import virtual_step
from mlo.steps.optimizer_state import COUNTERS, OptimizerState, optimizer_state, without_values
from mlo.training.gradients import Gradients, Records
from mlo.training.plan import Plan


@contextmanager
def looking_ahead(problems: Iterable[Problem], really: bool = True) -> Iterator[None]:
    """A context in which the problems' attribute ``looking_ahead`` is True (if ``really``)."""
    affected = list(problems)
    for problem in affected:
        problem.looking_ahead = really
    try:
        yield
    finally:
        for problem in affected:
            problem.looking_ahead = False


_NOT_YET = State({}, {})  # where a record's steps lead, until all of the round are taken


class Rollout:
    """Takes virtual steps for an engine."""

    def __init__(self, plan: Plan, evaluator: Evaluator, gradients: Gradients) -> None:
        self._plan = plan
        self._evaluator = evaluator
        self._gradients = gradients

    def below(
        self, top: str, due: Collection[str], states: Mapping[str, State], dtype: torch.dtype | None = None
    ) -> tuple[dict[str, State], Records]:
        """The states that the next steps of the problems below ``top`` lead to, and records of those steps.

        Args:
            due: the problems that step.
            states: of all problems, to begin with.
            dtype: of the floating-point tensors in ``states``, if it is another than the modules'.
        """
        reached, records = dict(states), Records()
        names = self._plan.graph.names
        below = [name for name in names[: names.index(top)] if name in due]
        if self._plan.lookahead:  # other tops step by themselves, not below this one
            below = [name for name in below if name not in self._plan.tops]
        with replay(None, self._evaluator.device, self._evaluator.draws_outside(below)):
            for position, name in enumerate(below):
                self._steps(name, reached, records, [*below[position + 1 :], top], dtype)
        return reached, records

    def _steps(
        self, name: str, states: dict[str, State], records: Records, later: Sequence[str], dtype: torch.dtype | None
    ) -> None:
        """The virtual steps of a problem in one round; recorded if one of ``later`` is differentiated through them."""
        problem, estimator = self._evaluator.problems[name], self._plan.estimators[name]
        targets, at = (
            self._plan.targets(name, later),
            cast_optimizer_state(optimizer_state(problem, copies=False), dtype),
        )
        values = self._gradients.needs_optimizer_state(name)
        recorded: list[Record] = []
        step = taken = 0  # steps taken, and of these recorded
        while (left := problem.steps_now - step) > 0:
            keep = bool(targets) and estimator.records(left - 1)
            count = self._gradients.at_once(name, states, taken, left) if keep else 0
            batches = [cast_batches(problem.batches_ahead(step + i), dtype) for i in range(max(count, 1))]
            if count and (several := self.at_once(name, states, batches, at, targets, "virtual", step)) is not None:
                record, states[name], at = several
                recorded.append(record)
                step, taken = step + count, taken + count
                continue
            before, was = states[name], at
            onto = targets if keep and self._gradients.kept_for_pullback(name, taken, left - 1) else ()
            stored = (
                estimator.stored(before, was if values else without_values(was), taken)
                if keep and estimator.needs_before
                else (None, None)
            )
            seen = self._gradients.seen(name, states, stored[0]) if onto else states
            with problem.at_step(problem.steps_taken + step):
                gradient = self._gradients.of(name, seen, records, batches[0], "virtual", onto)
            moved, at = virtual_step(problem, before.parameters, gradient.own, was)
            if keep:
                fresh = cast_batches(problem.batches_ahead(step + 1), dtype) if estimator.takes_fresh_batches else ()
                record = gradient.record(problem, *stored, _NOT_YET, states, fresh)
                if stored[1] is not None and self._gradients.needs_only_state_after(name):
                    record.optimizer_state = OptimizerState(was.groups, at.slots, stepped=True)
                recorded.append(record)
            states[name] = State({**before.parameters, **moved}, gradient.buffers)
            step, taken = step + 1, taken + keep
        for record in recorded:
            record.after = states[name]
        if targets:
            records[name] = recorded

    def at_once(
        self,
        name: str,
        states: Mapping[str, State],
        batches: Sequence[tuple[Any, ...]],
        optimizer_state: OptimizerState,
        targets: Collection[str],
        kind: str,
        ahead: int = 0,
    ) -> tuple[Record, State, OptimizerState] | None:
        """Several steps in one graph: their record, and what they led to; None if they can only be taken one by one."""
        problem, before = self._evaluator.problems[name], states[name]
        first = problem.steps_taken + ahead
        micro = MicroBatch(batches[-1][0], self._evaluator.capture(name), step=first + len(batches) - 1)
        with problem.at_step(first):
            taken = self._evaluator.segment(
                name,
                states,
                [batch for (batch,) in batches],
                optimizer_state.groups,
                optimizer_state.slots,
                kind=kind,
                through=targets,
            )
        if taken is None:  # it may have drawn random numbers before it failed
            micro.randomness.restore(self._evaluator.device)
            return None
        moved = {v: end.detach().requires_grad_() for v, end in zip(problem.variables, taken.end, strict=True)}
        after = State({**before.parameters, **moved}, taken.buffers)
        reads = {read: states[read] for read in problem.node.reads}
        record = Record(problem, before, after, None, optimizer_state, (micro,), reads, segment=taken)
        slots = {n: {k: v if v is None else v.detach() for k, v in slot.items()} for n, slot in taken.left.items()}
        return record, after, OptimizerState(optimizer_state.groups, slots)


def cast_state(state: State, dtype: torch.dtype) -> State:
    """A copy of the state with floating-point tensors of ``dtype``."""
    parameters = {n: _cast(p.detach(), dtype).requires_grad_(p.requires_grad) for n, p in state.parameters.items()}
    return State(parameters, {n: _cast(b, dtype) for n, b in state.buffers.items()})


def cast_optimizer_state(optimizer_state: OptimizerState, dtype: torch.dtype | None) -> OptimizerState:
    """The optimizer state with floating-point slots of ``dtype``; counters keep their precision."""
    if dtype is None:
        return optimizer_state
    slots = {
        name: {k: _cast(v, dtype) if isinstance(v, Tensor) and k not in COUNTERS else v for k, v in s.items()}
        for name, s in optimizer_state.slots.items()
    }
    return OptimizerState(optimizer_state.groups, slots)


def cast_batches(batches: tuple[Any, ...], dtype: torch.dtype | None) -> tuple[Any, ...]:
    """The batches with floating-point tensors of ``dtype``."""
    if dtype is None:
        return batches
    return tuple(tree_map_only(Tensor, lambda t: _cast(t, dtype), batch) for batch in batches)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
