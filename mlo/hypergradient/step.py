"""The steps of a lower problem, as recorded for differentiating through them, and its loss near one point."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, Protocol

import torch
from torch import Tensor

from mlo.levels.problem import Problem, State
from mlo.levels.read_cache import ReadCache, add_to
from mlo.ops.differentiable import ThriceDifferentiable, twice_differentiable
from mlo.ops.vectors import Vector, add, filled, scaled
from mlo.steps import sgd
from mlo.steps.evaluation import Evaluator
from mlo.steps.gradient_functions import MicroBatch, Segment, mean
from mlo.steps.optimizer import StepCotangents, differentiable_step, is_linear, pull_through_step, virtual_step
from mlo.steps.optimizer_state import OptimizerState
from mlo.steps.torch_step import off_zero


class Curvature(Protocol):
    """The first and second derivatives of one local loss at its point, t its variables and x what it reads."""

    def gradient(self) -> Vector:
        """The gradient in the problem's own variables."""

    def own(self, vector: Vector) -> Vector:
        """H_tt u: the Hessian in the problem's own variables."""

    def cross(self, vector: Vector) -> Cotangents:
        """H_xt u for each problem x that the loss reads: the gradient in x of <gradient in t, u>."""

    def both(self, vector: Vector) -> tuple[Vector, Cotangents]:
        """:meth:`own` and :meth:`cross` of one vector, for the price of one."""


Cotangents = dict[str, Vector | None]
Slots = Mapping[str, Mapping[str, Tensor]]


@dataclass
class Record:
    """All that one step of a problem depended on.

    Attributes:
        before, after: the problem's state on either side of the step (before: None if no estimator needs it, or if
            it is recomputed from an earlier step).
        gradient: {variable: its gradient, before clipping} that the step was taken with, if kept.
        unreached: variables that the step's loss did not depend on, and the optimizer left alone.
        optimizer_state: the hyperparameters of the step, and the optimizer's slots: those before it, where ``before``
            is kept, or those after it, if the state is ``stepped``.
        micro: what the loss was evaluated on; it is the mean over these.
        reads: the states of the problems that the loss read.
        fresh: the next batches of the problem, where an estimator takes curvature on these.
        read_cache: the outputs of the problems read, kept from the step for the pullback; None once they changed.
        base: {output of a problem read: the step's gradient for it}, if a product needs it.
        graph: the variables that the gradient was evaluated at, and the gradient with its graph, where the estimator
            takes exact products there.
        segment: the steps, where the record is of several in one graph; ``gradient`` is then not kept, and ``micro`` is
            of the last one.
        inner: {lower problem: its recorded steps}, lowest first, that the gradient itself ran through, where the
            curvature is to include that path; those steps are then part of the loss.
    """

    problem: Problem
    before: State | None
    after: State
    gradient: Mapping[str, Tensor | None] | None
    optimizer_state: OptimizerState | None
    micro: tuple[MicroBatch, ...]
    reads: dict[str, State]
    unreached: frozenset[str] = frozenset()
    fresh: tuple[MicroBatch, ...] = ()
    read_cache: ReadCache | None = field(default=None, repr=False)
    base: dict[Tensor, Tensor] | None = field(default=None, repr=False)
    inner: Mapping[str, Sequence[Record]] = field(default_factory=dict, repr=False)
    graph: tuple[Vector, Vector] | None = field(default=None, repr=False)
    segment: Segment | None = field(default=None, repr=False)

    def freeze(self, name: str) -> None:
        """Keep a copy of what the step read of problem ``name``, whose own tensors are about to change."""
        if name in self.reads and self.reads[name].live:
            self.reads[name] = copied(self.reads[name])
            self.read_cache = self.base = self.graph = None


class Step:
    """What an estimator sees of one step of a lower problem, to be pulled back onto ``targets``.

    Attributes:
        record: what the step depended on.
        targets: the problems onto which it is pulled back.
        warm: the solution that the last pullback left for this one, if any.
    """

    def __init__(
        self, record: Record, targets: Collection[str], evaluator: Evaluator, warm: Vector | None = None
    ) -> None:
        self.record = record
        self.targets = tuple(targets)
        self.warm = warm
        self._evaluator = evaluator

    def before(self) -> LocalLoss:
        """The loss around the parameters that the step was taken from."""
        record = self.record
        assert record.before is not None, "the estimator did not say that it needs the state before the step"
        return LocalLoss(record, record.before, record.micro, self.targets, self._evaluator, at_step=True)

    def after(self) -> LocalLoss:
        """The loss around the current solution, on the step's batch, or on a fresh one if the estimator uses these."""
        record = self.record
        micro = [replace(m, buffers=None) for m in record.fresh or record.micro]
        return LocalLoss(record, record.after, micro, self.targets, self._evaluator, at_step=False)

    def depends_on(self, target: str) -> bool:
        """Whether the loss depends on what it reads of ``target``; a pass, where that was not found out before."""
        pair = (self.record.problem.name, target)
        if pair not in self._evaluator.dependences:
            loss = self.after()
            found = next(loss.parts()).gradients(loss.point, own=False)[1]
            if loss.pull(found)[target] is None:
                return False
            self._evaluator.dependences.add(pair)
        return True

    def pull_through_optimizer(
        self, cotangent: Vector, curvature: Curvature, slots: Slots | None = None
    ) -> StepCotangents:
        """The optimizer's step, transposed (:func:`mlo.steps.optimizer.pull_through_step`).

        It is taken at the gradient that was recorded, else at the one that the ``curvature`` before the step has.
        """
        record = self.record
        assert record.before is not None and record.optimizer_state is not None
        gradients: dict[str, Tensor | None] = dict(record.gradient or {})
        if record.gradient is None:
            names = record.problem.variables
            at = cotangent if is_linear(record.problem) else curvature.gradient()
            gradients = {n: None if n in record.unreached else g for n, g in zip(names, at, strict=True)}
        return pull_through_step(
            record.problem, record.before.parameters, gradients, record.optimizer_state, cotangent, slots
        )

    def cross_through_optimizer(
        self, cotangent: Vector, curvature: Curvature, slots: Slots | None = None
    ) -> Cotangents:
        """:meth:`pull_through_optimizer`, and on from the gradient to what the loss read, by one product."""
        record = self.record
        assert record.optimizer_state is not None
        if slots is None and is_linear(record.problem):
            scales = set(
                sgd.scales(
                    record.problem, record.optimizer_state.groups, record.unreached, record.optimizer_state.slots
                )
            )
            if len(scales) == 1:  # what the loss read is mostly less than the variables
                (scale,) = scales
                return {t: None if c is None else scaled(c, scale) for t, c in curvature.cross(cotangent).items()}
        return curvature.cross(self.pull_through_optimizer(cotangent, curvature, slots).gradient)

    def pull_through_segment(self, cotangent: Vector, slots: Slots, oldest: bool) -> tuple[Vector, Slots, Cotangents]:
        """Steps in one graph, transposed: cotangents of variables and slots before them, and of what their loss read.

        Args:
            oldest: whether the cotangents before them are not needed.
        """
        reads, problems = self.record.reads, self._evaluator.problems
        inputs = {t: [reads[t].parameters[v] for v in problems[t].variables] for t in self.targets}
        assert self.record.segment is not None
        before, begun, found = self.record.segment.pull(
            cotangent, slots, list(chain.from_iterable(inputs.values())), oldest
        )
        rest = iter(found)
        return before, begun, {t: _reached(list(islice(rest, len(of))), of) for t, of in inputs.items()}

    def repeated(self) -> tuple[State, OptimizerState]:
        """The state and the optimizer that the step led to, computed again; one pass."""
        record = self.record
        assert record.before is not None and record.optimizer_state is not None
        name = record.problem.name
        variables = {v: record.before.parameters[v].detach().requires_grad_() for v in record.problem.variables}
        state = State({**record.before.parameters, **variables}, record.before.buffers)
        passes = (
            self._evaluator.differentiate(
                name,
                {**record.reads, name: micro.state(state)},
                micro.batch,
                of=(name,),
                kind="recompute",
                randomness=micro.randomness,
                step=micro.step,
                scale=micro.scale,
            )
            for micro in record.micro
        )
        done = mean(passes, len(record.micro))
        named = {n: done.gradients.get(v) for n, v in variables.items()}
        if record.gradient is not None:
            named = dict(record.gradient)
        moved, optimizer_state = virtual_step(record.problem, state.parameters, named, record.optimizer_state)
        return State({**state.parameters, **moved}, done.buffers), optimizer_state


class LocalLoss:
    """One problem's loss as a function of its own variables, everything else as it was at one step.

    Over several micro-batches it is the mean of :meth:`parts`, of which one graph is alive at a time.

    Attributes:
        point: the variables around which it is taken, one tensor each, requiring gradients.
        graph: the point as the step was evaluated at, and the gradient there with its graph, if they were kept.
    """

    def __init__(
        self,
        record: Record,
        at: State,
        micro: Sequence[MicroBatch],
        targets: Collection[str],
        evaluator: Evaluator,
        at_step: bool,
    ) -> None:
        self._record = record
        self._state = replace(at, live=False)
        self._micro = micro
        self._targets = targets
        self._evaluator = evaluator
        self._at_step = at_step
        self._gradient = record.gradient if at_step and len(micro) == len(record.micro) else None
        self._base = record.base if at_step else None
        self.point: Vector = tuple(at.parameters[n].detach().requires_grad_() for n in record.problem.variables)
        self.graph = record.graph if at_step else None
        self._autocast = False
        if record.problem.autocast is not None:
            self._read_cache, self._base = ReadCache(), None
            return
        self._read_cache = ReadCache() if record.read_cache is None else record.read_cache

    def under_autocast(self) -> LocalLoss:
        """The same, evaluated under the problem's autocast, as its steps are."""
        self._autocast = True
        return self

    @property
    def count(self) -> int:
        """Of micro-batches."""
        return len(self._micro)

    @property
    def alone(self) -> bool:
        """Whether it is of one micro-batch."""
        return len(self._micro) == 1

    def parts(self) -> Iterator[LocalLoss]:
        """The loss on each micro-batch."""
        for micro in self._micro:
            part = LocalLoss(self._record, self._state, [micro], self._targets, self._evaluator, self._at_step)
            yield part.under_autocast() if self._autocast else part

    def __call__(self, variables: Sequence[Tensor]) -> Tensor:
        """The loss at ``variables``: the same batch (of one micro-batch), the same random numbers, the same reads."""
        assert self.alone, "of several micro-batches, take the parts"
        states, options = self._at(variables)
        return self._evaluator.evaluate(self._record.problem.name, states, self._micro[0].batch, **options).loss

    def _at(self, variables: Sequence[Tensor]) -> tuple[dict[str, State], dict[str, Any]]:
        """The states of an evaluation at ``variables``, and how it is taken."""
        record, name, micro = self._record, self._record.problem.name, self._micro[0]
        moved = dict(zip(record.problem.variables, variables, strict=True))
        state = replace(micro.state(self._state), parameters={**self._state.parameters, **moved})
        states = {**record.reads, name: state}
        if record.inner:
            above = [n for n in states if n not in self._below(name)]
            states |= self._inner_states(record.inner, {n: states[n] for n in above}, {})
        return states, {
            "kind": "product",
            "through": {*self._targets, *record.inner}.difference(record.problem.node.held),
            "read_cache": self._read_cache,
            "moving": record.inner,
            "autocast": self._autocast,
            "randomness": micro.randomness,
            "step": micro.step,
        }

    def _inner_states(
        self, inner: Mapping[str, Sequence[Record]], states: Mapping[str, State], lower: Mapping[str, State]
    ) -> dict[str, State]:
        """Where the steps of the problems below one lead, lowest first, when they are taken again under ``states``."""
        reached = dict(lower)
        for name, records in inner.items():
            reached[name] = self._inner_steps(name, records, states, reached)
        return {name: reached[name] for name in inner}

    def _inner_steps(
        self, name: str, records: Sequence[Record], states: Mapping[str, State], lower: Mapping[str, State]
    ) -> State:
        """Where the recorded steps of one problem lead, with the graph of all of them.

        Args:
            states: of the problem whose steps these are part of and of those above it. What lies between is read as it
                was recorded, before its own steps.
            lower: of those below, after the steps that they took before.
        """
        below = self._below(name)
        read_from = {**states, **{read: state for read, state in lower.items() if read in below}}
        first = records[0]
        assert first.before is not None and first.optimizer_state is not None
        variables = {v: first.before.parameters[v].detach().requires_grad_() for v in first.problem.variables}
        state, optimizer_state = (
            State({**first.before.parameters, **variables}, first.before.buffers),
            first.optimizer_state,
        )
        for record in records:
            assert record.optimizer_state is not None
            reads = {read: read_from.get(read, there) for read, there in record.reads.items()}
            losses, buffers = [], state.buffers
            for micro in record.micro:
                at_micro = {**reads, name: State(state.parameters, buffers)}
                at_micro |= self._inner_states(record.inner, {**states, name: at_micro[name]}, lower)
                with twice_differentiable(), ThriceDifferentiable():
                    evaluation = self._evaluator.evaluate(
                        name,
                        at_micro,
                        micro.batch,
                        kind="product",
                        through=at_micro.keys() - set(record.problem.node.held),
                        autocast=record.problem.autocast is not torch.float16,  # whose gradients would vanish
                        randomness=micro.randomness,
                        step=micro.step,
                    )
                losses.append(evaluation.loss)
                buffers = evaluation.buffers
            loss = torch.stack(losses).mean()
            variables = {v: state.parameters[v] for v in record.problem.variables}
            found = torch.autograd.grad(loss, list(variables.values()), create_graph=True, allow_unused=True)
            gradients = {v: None if g is None else off_zero(g) for v, g in zip(variables, found, strict=True)}
            at = OptimizerState(record.optimizer_state.groups, optimizer_state.slots)
            variables, optimizer_state = differentiable_step(record.problem, variables, gradients, at)
            state = State({**state.parameters, **variables}, buffers)
        return state

    def _below(self, name: str) -> list[str]:
        names = list(self._evaluator.problems)
        return names[: names.index(name)]

    def gradients(
        self, variables: Vector, own: bool = True, inputs: bool = True, keep_graph: bool = False
    ) -> tuple[Vector, dict[Tensor, Tensor]]:
        """The gradient at ``variables`` in them (if ``own``) and in :meth:`inputs` (if ``inputs``); one pass."""
        if not self.alone:
            return self._mean_gradients(variables, own, inputs)
        name, states, options = self._arguments(variables, own, inputs)
        done = self._evaluator.differentiate(
            name, states, self._micro[0].batch, leaves=inputs, keep_graph=keep_graph, **options
        )
        return self._parted(done.gradients, variables, own, inputs)

    def _arguments(self, variables: Vector, own: bool, inputs: bool) -> tuple[str, dict[str, State], dict[str, Any]]:
        """The evaluator's arguments for derivatives in the variables and in those of the targets."""
        name = self._record.problem.name
        states, options = self._at(variables)
        return name, states, {**options, "of": (*((name,) if own else ()), *(self._targets if inputs else ()))}

    def _parted(
        self, found: dict[Tensor, Tensor], variables: Vector, own: bool, inputs: bool
    ) -> tuple[Vector, dict[Tensor, Tensor]]:
        wanted = variables if own else ()
        at_inputs = {key: found[key] for key in self.inputs() if key in found} if inputs else {}
        return filled((found.get(v) for v in wanted), wanted), at_inputs

    def _mean_gradients(self, variables: Vector, own: bool, inputs: bool) -> tuple[Vector, dict[Tensor, Tensor]]:
        total: Vector = ()
        at_inputs: dict[Tensor, Tensor] = {}
        share = 1 / len(self._micro)
        for part in self.parts():
            of_own, of_inputs = part.gradients(variables, own, inputs)
            total = add(total, of_own, share) if total else scaled(of_own, share)
            pulled = part.pull(of_inputs) if inputs else {}
            for target, found in pulled.items():
                if found is not None:
                    add_to(at_inputs, self._parameters_of(target), scaled(found, share))
        return total, at_inputs

    def product(self, vector: Vector, own: bool, inputs: bool) -> tuple[Vector, dict[Tensor, Tensor]] | None:
        """The exact product with ``vector``, compiled as a whole; None where that cannot be."""
        name, states, options = self._arguments(self.point, own, inputs)
        found = self._evaluator.product(name, states, self._micro[0].batch, vector, **options)
        return None if found is None else self._parted(found, self.point, own, inputs)

    def base(self) -> tuple[Vector, dict[Tensor, Tensor]]:
        """:meth:`gradients` at the point: the step's own where they are known, else one pass."""
        if self._gradient is not None and self._base is not None:
            return filled(self._gradient.values(), self.point), self._base
        return self.gradients(self.point)

    def gradient(self) -> Vector:
        """The gradient at the point: the step's own where it is known, else one pass."""
        if self._gradient is not None:
            return filled(self._gradient.values(), self.point)
        return self.gradients(self.point, inputs=False)[0]

    def inputs(self) -> list[Tensor]:
        """The tensors by which the problems read enter the evaluations made so far."""
        return [*self._read_cache.leaves, *(p for target in self._targets for p in self._parameters_of(target))]

    def pull(self, cotangents: dict[Tensor, Tensor]) -> dict[str, Vector | None]:
        """Cotangents of :meth:`inputs`, taken on to the variables of each target (None: no gradient reaches it)."""
        pulled = self._read_cache.pull(cotangents)
        answer: dict[str, Vector | None] = {}
        for target in self._targets:
            variables = self._parameters_of(target)
            answer[target] = _reached([pulled.get(variable) for variable in variables], variables)
        return answer

    def _parameters_of(self, target: str) -> list[Tensor]:
        parameters = self._record.reads[target].parameters
        return [parameters[name] for name in self._evaluator.problems[target].variables]


def _reached(found: Sequence[Tensor | None], variables: Sequence[Tensor]) -> Vector | None:
    """Cotangents of one problem's variables, one tensor each; None if no gradient reaches any of them."""
    return None if all(f is None for f in found) else filled(found, variables)


def copied(state: State, device: torch.device | None = None) -> State:
    """A copy of the state on ``device``; its parameters require gradients where those of the state do."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device or tensor.device, copy=True)

    parameters = {n: copy(p).requires_grad_(p.requires_grad) for n, p in state.parameters.items()}
    return State(parameters, {n: copy(b) for n, b in state.buffers.items()})


def cotangents_of(inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> dict[Tensor, Tensor]:
    """{input: its gradient}, of those that have one."""
    total: dict[Tensor, Tensor] = {}
    add_to(total, inputs, gradients)
    return total
