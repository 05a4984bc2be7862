"""The last step of a lower problem, as recorded for differentiating through it, and its loss near one point."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mlo.evaluation import Evaluator
from mlo.memo import Memo, add_to
from mlo.optimizers import Moment, pull_through_step
from mlo.problem import Problem, State
from mlo.randomness import Randomness
from mlo.vectors import Vector, filled


@dataclass
class Record:
    """All that one step of a problem depended on.

    Attributes:
        before, after: the problem's state on either side of the step (before: None where no response asks for it).
        gradient: {variable: its gradient, before clipping} that the step was taken with.
        moment: the optimizer before the step.
        batch, randomness: what the loss was evaluated on, and the random state that it drew from.
        reads: the states of the problems that the loss read.
        memo: the outputs of the problems read, kept from the step for the pullback; None once they changed.
    """

    problem: Problem
    before: State | None
    after: State
    gradient: Mapping[str, Tensor | None]
    moment: Moment | None
    batch: Any
    randomness: Randomness
    reads: dict[str, State]
    memo: Memo | None = field(default=None, repr=False)

    def freeze(self, name: str) -> None:
        """Keep a copy of what the step read of problem ``name``, whose own tensors are about to change."""
        if name in self.reads and self.reads[name].live:
            self.reads[name] = copied(self.reads[name])
            self.memo = None


class LastStep:
    """What a response sees of a lower problem: its last step, to be pulled back onto ``targets``."""

    def __init__(self, record: Record, targets: Collection[str], evaluator: Evaluator) -> None:
        self.record = record
        self.targets = tuple(targets)
        self._evaluator = evaluator

    def before(self) -> LocalLoss:
        """The loss around the parameters that the step was taken from."""
        assert self.record.before is not None, "the response did not say that it needs the state before the step"
        return LocalLoss(self.record, self.record.before, self.targets, self._evaluator)

    def after(self) -> LocalLoss:
        """The loss around the present solution."""
        return LocalLoss(self.record, self.record.after, self.targets, self._evaluator)

    def pull_through_optimizer(self, cotangent: Vector) -> Vector:
        """From the cotangent of the solution to that of the gradient: the optimizer's step, transposed."""
        record = self.record
        assert record.before is not None and record.moment is not None
        return pull_through_step(record.problem, record.before.parameters, record.gradient, record.moment, cotangent)


class LocalLoss:
    """One problem's loss as a function of its own variables, everything else as it was at its last step.

    Attributes:
        point: the variables around which it is taken, one tensor each, requiring gradients.
    """

    def __init__(self, record: Record, at: State, targets: Collection[str], evaluator: Evaluator) -> None:
        self._record = record
        self._state = replace(at, live=False)
        self._targets = targets
        self._evaluator = evaluator
        self.point: Vector = tuple(at.parameters[n].detach().requires_grad_() for n in record.problem.variables)
        if record.memo is None:
            record.memo = Memo()
        self._memo = record.memo

    def __call__(self, variables: Sequence[Tensor]) -> Tensor:
        """The loss at ``variables``: the same batch, the same random numbers, the same reads."""
        name = self._record.problem.name
        moved = dict(zip(self._record.problem.variables, variables, strict=True))
        state = replace(self._state, parameters={**self._state.parameters, **moved})
        return self._evaluator.evaluate(
            name,
            {**self._record.reads, name: state},
            self._record.batch,
            kind="product",
            through=self._targets,
            memo=self._memo,
            randomness=self._record.randomness,
        ).loss

    def inputs(self) -> list[Tensor]:
        """The tensors by which the problems read enter the evaluations made so far."""
        parameters = [self._record.reads[t].parameters[v] for t in self._targets for v in self._variables_of(t)]
        return [*self._memo.leaves, *parameters]

    def pull(self, cotangents: dict[Tensor, Tensor]) -> dict[str, Vector | None]:
        """Cotangents of :meth:`inputs`, taken on to the variables of each target (None: no gradient reaches it)."""
        pulled = self._memo.pull(cotangents)
        answer: dict[str, Vector | None] = {}
        for target in self._targets:
            variables = [self._record.reads[target].parameters[v] for v in self._variables_of(target)]
            found = [pulled.get(variable) for variable in variables]
            answer[target] = None if all(f is None for f in found) else filled(found, variables)
        return answer

    def _variables_of(self, target: str) -> Collection[str]:
        return self._evaluator.problems[target].variables


def copied(state: State) -> State:
    """A state of its own, of the same values; differentiable where the other was."""
    with torch.no_grad():
        parameters = {n: p.clone().requires_grad_(p.requires_grad) for n, p in state.parameters.items()}
        buffers = {n: b.clone() for n, b in state.buffers.items()}
    return State(parameters, buffers)


def cotangents_of(inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> dict[Tensor, Tensor]:
    """{input: its gradient}, of those that have one."""
    total: dict[Tensor, Tensor] = {}
    add_to(total, inputs, gradients)
    return total
