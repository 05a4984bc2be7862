"""Estimators that differentiate several steps of a lower problem: unrolled and truncated backpropagation."""

from __future__ import annotations

import itertools
from abc import ABC
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field

from mlo.hypergradient.estimators.base import AlongSteps, Pulled
from mlo.hypergradient.step import Cotangents, Slots, Step, copied
from mlo.levels.problem import State
from mlo.ops.vectors import Vector, add
from mlo.steps.optimizer_state import OptimizerState, moved_optimizer_state


class Backpropagation(AlongSteps, ABC):
    """The derivative of the recorded steps, from the last to the first, with one curvature product per step.

    Cotangents flow through the parameters and through the optimizer's state (momentum, Adam's moments).

    Memory is needed for the stored states, and at most ``graph_memory`` for autograd graphs. Steps keep the graph of
    their gradient as long as it fits; for the others it is computed again, one at a time. Steps of torch's SGD
    are recorded in one graph as far as it fits, and differentiated by one backward pass. Storing only every n-th state
    saves memory and costs one more pass per step, to recompute the others. States can be stored on the CPU.
    """

    every: int = Field(1, ge=1, description="store every n-th state and recompute the others")
    store_on: Literal["device", "cpu"] = Field("device", description="where the states are stored")
    graph_memory: float = Field(
        16.0, ge=0, description="MiB for autograd graphs of steps; graphs beyond it are computed again, one pass each"
    )

    def stored(
        self, state: State, optimizer_state: OptimizerState, index: int
    ) -> tuple[State | None, OptimizerState | None]:
        """Every ``every``-th state, on ``store_on``; of the others only the hyperparameters."""
        if index % self.every:
            return None, OptimizerState(optimizer_state.groups, {})
        if self.store_on == "cpu":
            return copied(state, torch.device("cpu")), moved_optimizer_state(optimizer_state, torch.device("cpu"))
        return copied(state) if state.live else state, optimizer_state

    @property
    def repeats(self) -> bool:
        """Whether not all states are stored."""
        return self.every > 1

    @property
    def in_one_graph(self) -> bool:
        """If all states stay on the device and the product uses graphs."""
        return self.keeps_graph and self.every == 1 and self.store_on == "device"

    @property
    def graph_bytes(self) -> float:
        """The option ``graph_memory``, in bytes."""
        return self.graph_memory * 2**20

    def pull(self, steps: Sequence[Step], cotangent: Vector) -> Pulled:
        """One product and one pullback through the optimizer for each step."""
        total: dict[str, Vector | None] = dict.fromkeys(steps[-1].targets)
        slots: Slots = {}
        oldest = steps[0]
        for step in _backwards(steps):
            if step.record.segment is not None:
                cotangent, slots, cross = step.pull_through_segment(cotangent, slots, step is oldest)
            else:
                cotangent, slots, cross = self._pull_step(step, cotangent, slots, step is oldest)
            for target, found in cross.items():
                so_far = total[target]
                total[target] = so_far if found is None else found if so_far is None else add(so_far, found)
        return Pulled(total)

    def _pull_step(self, step: Step, cotangent: Vector, slots: Slots, oldest: bool) -> tuple[Vector, Slots, Cotangents]:
        """Pull back one step: cotangents of the variables and slots before it, and of what its loss read.

        For the ``oldest`` step, the first two are not computed.
        """
        curvature = self.product.at(step.before())
        if oldest:
            return cotangent, slots, step.cross_through_optimizer(cotangent, curvature, slots or None)
        pulled = step.pull_through_optimizer(cotangent, curvature, slots)
        own, cross = curvature.both(pulled.gradient)
        return add(pulled.parameters, own), pulled.slots, cross


class Unrolled(Backpropagation):
    """The derivative of all steps since the last upper step, exact (Maclaurin et al. 2015; Franceschi et al. 2017)."""

    def records(self, left: int) -> bool:
        """All steps are recorded."""
        return True


class Truncated(Backpropagation):
    """The derivative of the last ``steps`` steps; everything before them is held fixed (Shaban et al. 2019)."""

    steps: int = Field(5, ge=1, description="number of steps to differentiate")

    def records(self, left: int) -> bool:
        """The last ``steps`` steps are recorded."""
        return left < self.steps


def _backwards(steps: Sequence[Step]) -> Iterator[Step]:
    """The steps, last first. Each has the state before it while it is used; recomputed states are freed afterwards."""
    stored = [i for i, step in enumerate(steps) if step.record.before is not None]
    for first, end in zip(reversed(stored), reversed([*stored[1:], len(steps)]), strict=True):
        segment = steps[first:end]
        record, kept = segment[0].record, (segment[0].record.before, segment[0].record.optimizer_state)
        device = record.after.device
        assert record.before is not None and record.optimizer_state is not None
        if record.before.device != device:
            record.before, record.optimizer_state = (
                copied(record.before, device),
                moved_optimizer_state(record.optimizer_state, device),
            )
        for before, step in itertools.pairwise(segment):
            state, reached = before.repeated()
            assert step.record.optimizer_state is not None
            step.record.before = state
            step.record.optimizer_state = type(reached)(step.record.optimizer_state.groups, reached.slots)
        for step in reversed(segment):
            yield step
            if step is not segment[0]:
                assert step.record.optimizer_state is not None
                step.record.before = None
                step.record.optimizer_state = OptimizerState(step.record.optimizer_state.groups, {})
            if len(steps) > 1:  # with one step, another upper problem may reuse them; with many, memory matters more
                step.record.read_cache = step.record.base = step.record.graph = None
        record.before, record.optimizer_state = kept
