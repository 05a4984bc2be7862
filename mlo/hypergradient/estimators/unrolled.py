"""Estimators that differentiate recorded steps of the user's optimizer: backpropagation, unrolled or truncated."""

from __future__ import annotations

import itertools
from abc import ABC
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from mlo.hypergradient.estimators.base import Estimator, Pulled, Recording
from mlo.hypergradient.products import Exact, ProductOption
from mlo.levels.problem import Problem
from mlo.levels.state import copied
from mlo.ops.vectors import Vector, add, scaled, total
from mlo.steps.step import NOT_STORED, Cotangents, OfSlots, Step
from mlo.steps.trials import check_differentiable


class AlongSteps(Estimator, ABC):
    """The derivative of the last recorded steps, from the last to the first, with one curvature product per step.

    Cotangents flow through the variables and through the optimizer's state (momentum, Adam's moments).

    Attributes:
        last: how many steps of a round are differentiated; None: all.
    """

    last: ClassVar[int | None] = 1
    product: ProductOption = Field(Exact(), description="how curvature products are computed")

    @property
    def recording(self) -> Recording:
        """The states before the steps, and what the product uses."""
        return Recording(self.last, before=True, graph=self.product.keeps_graph, base=self.product.needs_base)

    def check(self, problem: Problem) -> None:
        """Raise a ConfigError if a step of the problem's optimizer is not differentiable."""
        check_differentiable(problem)

    def pull(self, steps: Sequence[Step], cotangent: Vector, targets: Sequence[str], warm: Vector | None) -> Pulled:
        """One product and one pullback through the optimizer for each step."""
        found: Cotangents = dict.fromkeys(targets)
        slots: OfSlots = ()
        here = steps[0].point.state.variables[0].device == steps[0].point.level.device
        for step in steps if here and len(steps) == 1 else _backwards(steps):
            oldest = step is steps[0]
            if step.joined is not None:
                cotangent, slots, cross = step.pull_joined(cotangent, slots, targets, oldest)
            elif oldest:
                cross = self._cross(step, cotangent, slots, targets)
            else:
                cotangent, slots, cross = self._pull(step, cotangent, slots, targets)
            for target, more in cross.items():
                so_far = found[target]
                found[target] = more if so_far is None else total(so_far, more)
        return Pulled(found)

    def _pull(
        self, step: Step, cotangent: Vector, slots: OfSlots, targets: Sequence[str]
    ) -> tuple[Vector, OfSlots, Cotangents]:
        """Pull back one step: cotangents of the variables and slots before it, and of what its loss read."""
        curvature = self.product.before(step, targets)
        pulled = step.transpose(cotangent, slots or ({},) * len(cotangent))
        own, cross = curvature(pulled.gradient)
        return add(pulled.variables, own), pulled.slots, cross

    def _cross(self, step: Step, cotangent: Vector, slots: OfSlots, targets: Sequence[str]) -> Cotangents:
        """Pull back the oldest step, before which everything is held fixed, onto what its loss read."""
        curvature = self.product.before(step, targets)
        if not any(slots) and (scale := step.scale()) is not None:
            _, cross = curvature(cotangent, own=False)  # what the loss read is mostly less than the variables
            return {target: None if c is None else scaled(c, scale) for target, c in cross.items()}
        return curvature(step.transpose(cotangent, slots if any(slots) else None).gradient, own=False)[1]


class Backpropagation(AlongSteps, ABC):
    """Backpropagation through several steps, in bounded memory.

    Memory is needed for the stored states, and at most ``graph_memory`` for autograd graphs. Steps keep the graph of
    their gradient as long as it fits; for the others it is computed again, one at a time. Steps of torch's SGD
    are recorded in one graph as far as it fits, and differentiated by one backward pass. Storing only every n-th state
    saves memory and costs one more pass per step, to recompute the others. States can be stored on the CPU.
    """

    every: int = Field(1, ge=1, description="store every n-th state and recompute the others")
    store_on: Literal["device", "cpu"] = Field("device", description="where the states are stored")
    graph_memory: float = Field(
        64.0, ge=0, description="MiB for autograd graphs of steps; graphs beyond it are computed again, one pass each"
    )

    @property
    def recording(self) -> Recording:
        """The states before the steps, thinned, and graphs as far as memory is allowed for them."""
        kept = super().recording
        return replace(kept, graph_bytes=self.graph_memory * 2**20, every=self.every, store_on=self.store_on)


class Unrolled(Backpropagation):
    """The derivative of all steps since the last upper step, exact (Maclaurin et al. 2015; Franceschi et al. 2017)."""

    last: ClassVar[int | None] = None


class Truncated(Backpropagation):
    """The derivative of the last ``steps`` steps; everything before them is held fixed (Shaban et al. 2019)."""

    steps: int = Field(5, ge=1, description="number of steps to differentiate")

    @property
    def recording(self) -> Recording:
        """See :class:`Backpropagation`."""
        return replace(super().recording, last=self.steps)


def _backwards(steps: Sequence[Step]) -> Iterator[Step]:
    """The steps, last first. Each has the state before it while it is used; recomputed states are freed afterwards."""
    stored = [index for index, step in enumerate(steps) if step.stored]
    for first, end in zip(reversed(stored), reversed([*stored[1:], len(steps)]), strict=True):
        segment = steps[first:end]
        point, device = segment[0].point, segment[0].point.level.device
        if point.state.device != device:
            segment[0].point = point._replace(state=copied(point.state, device))
        for before, step in itertools.pairwise(segment):
            step.point = step.point._replace(state=before.repeated())
        for step in reversed(segment):
            yield step
            if step is not segment[0]:
                step.point = step.point._replace(state=NOT_STORED)
            if len(steps) > 1:  # with one step, another upper problem may reuse them; with many, memory matters more
                step.forget()
        if segment[0].point.state is not point.state:
            segment[0].point = segment[0].point._replace(state=point.state)
