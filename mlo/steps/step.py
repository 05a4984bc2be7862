"""One step of a level, as recorded for differentiating through it; the step repeated, and transposed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, repeat
from operator import is_not

from torch import Tensor

from mlo.levels.state import State
from mlo.ops.vectors import Vector, filled
from mlo.steps import sgd
from mlo.steps.evaluation import MicroBatch
from mlo.steps.losses import Found
from mlo.steps.operators import reraise
from mlo.steps.optimizer import Groups, StepCotangents, transpose_step, virtual_step
from mlo.steps.point import Gradient, Point, Wanted, gradient, own_gradient
from mlo.steps.scan import Joined

#: {problem read: the cotangents of its variables, or None if nothing reaches it}
Cotangents = dict[str, Vector | None]
OfSlots = Sequence[Mapping[str, Tensor]]
NOT_STORED = State(())


@dataclass
class Step:
    """All that one step of a level depended on.

    Attributes:
        point: where its gradient was taken; its state, with the optimizer's slots, is the one before the step, or
            ``NOT_STORED`` if no estimator needs it, or if it is recomputed from an earlier step.
        groups: the optimizer's hyperparameters.
        linear: whether the optimizer's step is linear: its Jacobian needs no values of gradient and slots.
        stepped: whether the slots are those after the step, from which it can be transposed as well.
        gradient: of the level's variables, before clipping, if kept.
        unreached: the positions of variables that the loss did not depend on, and the optimizer left alone.
        solution: the state that all steps of the round led to.
        fresh: the next batches of the problem, where an estimator takes curvature on these.
        base: the gradient also for what the loss read, if a product needs it.
        graph: the variables that the gradient was taken at, and the gradient with its graph, where the estimator takes
            exact products there.
        joined: the steps, where the record is of several in one graph; ``gradient`` is then not kept, and the point's
            micro-batch is that of the last one.
    """

    point: Point
    groups: Groups
    linear: bool
    stepped: bool = False
    gradient: Found | None = None
    unreached: frozenset[int] = frozenset()
    solution: State = NOT_STORED
    fresh: tuple[MicroBatch, ...] = ()
    base: Gradient | None = field(default=None, repr=False)
    graph: tuple[Vector, Vector] | None = field(default=None, repr=False)
    joined: Joined | None = field(default=None, repr=False)

    @property
    def stored(self) -> bool:
        """Whether the state before the step is kept."""
        return bool(self.point.state.variables)

    def forget(self) -> None:
        """Free what is kept for products at the step's point."""
        if self.point.cache is not None:
            self.point = self.point._replace(cache=None)
        self.base = self.graph = None

    def at_solution(self) -> Point:
        """The point of the solution, with the step's batch, or a fresh one if the estimator uses these."""
        micro = self.fresh or self.point.micro
        micro = tuple([each._replace(buffers=None) for each in micro])
        return self.point._replace(state=self.solution._replace(live=False), micro=micro, apart=False)

    def repeated(self) -> State:
        """The state and the slots that the step led to, computed again; one pass for each micro-batch, if needed."""
        problem, state = self.point.level.problem, self.point.state
        variables = tuple([v.detach().requires_grad_() for v in state.variables])
        state = state._replace(variables=variables, live=False)
        found = self.gradient
        if found is None or state.buffers:
            done = gradient(self.point.at(variables), Wanted((problem.name,), "recompute"))
            state = state._replace(buffers=done.buffers)
            found = done.found[problem.name] if found is None else found
        return virtual_step(problem, state, found, self.groups)

    @property
    def needs_gradient(self) -> bool:
        """Whether the transpose needs the gradient's values, and they were not kept."""
        return self.gradient is None and not self.linear

    def gradient_taken(self) -> Found:
        """The gradient that the optimizer took: as recorded, or computed again, unless only its presence matters."""
        if self.gradient is not None:
            return self.gradient
        if not self.needs_gradient:
            found: Vector = self.point.state.variables
        elif self.graph is not None:
            found = tuple([part.detach() for part in self.graph[1]])
        else:
            found = own_gradient(self.point)
        return [None if index in self.unreached else part for index, part in enumerate(found)]

    def transpose(self, cotangent: Vector, slots: OfSlots | None = None) -> StepCotangents:
        """The optimizer's step, transposed: see :func:`mlo.steps.optimizer.transpose_step`."""
        return transpose_step(
            self.point.level.problem,
            self.point.state,
            self.gradient_taken(),
            self.groups,
            cotangent,
            slots,
            stepped=self.stepped,
        )

    def scale(self) -> float | Tensor | None:
        """The number by which the transposed step multiplies a cotangent, if it is one number for all variables."""
        if not self.linear:
            return None
        of, slots = map(self.groups.__getitem__, self.point.level.problem.group_numbers), self.point.state.slots
        scales = sgd.scales(of, self.unreached, slots)
        if sgd.by_numbers(self.groups):
            return scales[0] if len({*scales}) == 1 else None
        alike = len(self.groups) == 1 and not self.unreached and len({*map(frozenset, slots)}) < 2
        return scales[0] if alike else None

    def pull_joined(
        self, cotangent: Vector, slots: OfSlots, targets: Collection[str], oldest: bool
    ) -> tuple[Vector, OfSlots, Cotangents]:
        """Joined steps, transposed: cotangents of variables and slots before them, and of what their loss read.

        Args:
            oldest: whether the cotangents before them are not needed.
        """
        assert self.joined is not None
        inputs = {target: self.point.reads[target].variables for target in targets}
        onto = [*chain.from_iterable(inputs.values())]
        try:
            before, of_slots, found = self.joined.pull(cotangent, slots, onto, oldest)
        except RuntimeError as error:
            reraise(self.point.level, error)
        rest = iter(found)
        return before, of_slots, {t: reached(list(islice(rest, len(of))), of) for t, of in inputs.items()}


def reached(found: Found, variables: Sequence[Tensor]) -> Vector | None:
    """Cotangents of one problem's variables, one tensor each; None if no gradient reaches any of them."""
    return filled(found, variables) if any(map(is_not, found, repeat(None))) else None
