"""Estimators that walk the lower problem's steps backwards: unrolled and truncated backpropagation."""

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
from mlo.steps.optimizer import OptimizerState, moved_optimizer_state


class Backpropagation(AlongSteps, ABC):
    """The recorded steps walked backwards, each by a curvature product of its own.

    Cotangents flow through the parameters and through the optimizer's state (momentum, Adam's moments). Memory grows
    by the stored states, and by ``graph_memory`` at most: as many steps as fit there keep the graph of their gradient,
    the others make it again, one alive at a time. Virtual steps by torch's SGD are taken in one graph as far as it
    fits, and walked back by one backward. States can be thinned, with the others recomputed (one more pass a step),
    and kept on the CPU.
    """

    every: int = Field(1, ge=1, description="store every n-th state, and recompute the others")
    store_on: Literal["device", "cpu"] = Field("device", description="where the states are stored")
    graph_memory: float = Field(
        16.0, ge=0, description="MiB of steps' graphs kept for exact products; beyond it they are made again, in a pass"
    )

    def stored(self, state: State, at: OptimizerState, index: int) -> tuple[State | None, OptimizerState | None]:
        """Every ``every``-th, where the options have it; of the others the hyperparameters alone."""
        if index % self.every:
            return None, OptimizerState(at.groups, {})
        if self.store_on == "cpu":
            return copied(state, torch.device("cpu")), moved_optimizer_state(at, torch.device("cpu"))
        return copied(state) if state.live else state, at

    @property
    def repeats(self) -> bool:
        """Where states are thinned."""
        return self.every > 1

    @property
    def in_one_graph(self) -> bool:
        """Where all states are kept on the device anyway."""
        return self.keeps_graph and self.every == 1 and self.store_on == "device"

    @property
    def graph_bytes(self) -> float:
        """As the options have it."""
        return self.graph_memory * 2**20

    def pull(self, steps: Sequence[Step], cotangent: Vector) -> Pulled:
        """One product and one optimizer pullback for each step."""
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
        """Cotangents of variables and slots before one step, if it is not the ``oldest``, and of what its loss read."""
        curvature = self.product.at(step.before())
        if oldest:
            return cotangent, slots, step.cross_through_optimizer(cotangent, curvature, slots or None)
        pulled = step.pull_through_optimizer(cotangent, curvature, slots)
        own, cross = curvature.both(pulled.gradient)
        return add(pulled.parameters, own), pulled.slots, cross


class Unrolled(Backpropagation):
    """All steps since the last upper one, walked backwards."""

    def records(self, left: int) -> bool:
        """All."""
        return True


class Truncated(Backpropagation):
    """The last ``steps`` steps walked backwards; what came before them is held fixed (Shaban et al. 2019)."""

    steps: int = Field(5, ge=1, description="steps walked backwards")

    def records(self, left: int) -> bool:
        """The last ones."""
        return left < self.steps


def _backwards(steps: Sequence[Step]) -> Iterator[Step]:
    """The steps, last first, each with the state that it was taken from; gone again once it is done."""
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
            if len(steps) > 1:  # one step's may serve another upper problem too; of many, memory counts
                step.record.read_cache = step.record.base = step.record.graph = None
        record.before, record.optimizer_state = kept
