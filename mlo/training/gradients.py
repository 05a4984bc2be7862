"""The gradient of one problem's loss at one state, through the training of lower problems where it is an upper one."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import repeat
from operator import is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlo.errors import GraphError
from mlo.hypergradient import name_of
from mlo.hypergradient.backward import backward, unreached
from mlo.levels.read_cache import ReadCache
from mlo.levels.state import State
from mlo.ops import distributed, vectors
from mlo.ops.callers import users_line
from mlo.ops.vectors import Vector, dense, filled
from mlo.steps.evaluation import MicroBatch, evaluate
from mlo.steps.level import Level
from mlo.steps.losses import Found, loss_of
from mlo.steps.point import Gradient, Point, Wanted, gradient, pulled
from mlo.steps.step import Step, reached
from mlo.training.plan import Plan

Records = dict[str, list[Step]]
UNSOLVED = 0.5  # relative residual of a linear system above which there is a warning


class Hypergradient(dict[str, Tensor]):
    """{parameter name: tensor}, as :meth:`mlo.Engine.hypergradient` returns it.

    Attributes:
        metrics: {"<problem>/<name>": number}, what the estimators reported, such as the residual of a linear solve.
    """

    def __init__(self, tensors: Mapping[str, Tensor], metrics: Mapping[str, float]) -> None:
        super().__init__(tensors)
        self.metrics = metrics


class Taken(NamedTuple):
    """The gradient of a step, with what a record of the step keeps.

    Attributes:
        loss: detached, on the device.
        own: the gradient of the level's variables; None where the loss does not reach one.
        buffers: the module's after the evaluation.
        point: where it was taken.
        base, graph: see :class:`mlo.steps.step.Step`.
        kept: whether a record keeps the gradient; if not, it is computed again where it is needed.
    """

    loss: Tensor
    own: Found
    buffers: Vector
    point: Point
    base: Gradient | None = None
    graph: tuple[Vector, Vector] | None = None
    kept: bool = False

    def over_processes(self) -> Taken:
        """That of the mean of all processes' losses, each on its own batch; the buffers are the first process's.

        Averaged before anything is done with it, a loss that is not finite in one process is so in all.
        """
        sent = filled(dense(self.own), self.point.state.variables)
        flags = self.loss.new_ones(len(sent))
        for index, each in enumerate(self.own):
            if each is None:
                flags[index] = 0
        loss, flags, *found = distributed.average([self.loss, flags, *sent])
        mine = [each is not None for each in self.own]
        reaches = mine if all(mine) else (flags > 0).tolist()  # None only where no process's loss reaches it
        own = [each if there else None for each, there in zip(found, reaches, strict=True)]
        return self._replace(loss=loss, own=own, buffers=tuple(distributed.copies(list(self.buffers))))


class Gradients:
    """Takes gradients for an engine.

    Attributes:
        pullbacks: {problem: how often a cotangent was pulled back through it}.
        reports: {"<problem>/<name>": scalar tensor}, what the last pullbacks of real steps reported.
        latest: the same of the last backward pass, real or virtual.
        warm: {upper problem: {lower: the solution that its last real step left}}.
    """

    def __init__(self, plan: Plan, levels: Mapping[str, Level]) -> None:
        self._plan, self._levels, self._alone = plan, levels, distributed.world() == 1
        self.pullbacks: Counter[str] = Counter()
        self.reports: dict[str, Tensor] = {}
        self.latest: dict[str, Tensor] = {}
        self.warm: dict[str, dict[str, Vector]] = {}
        self._warned: set[str] = set()
        self._continued: set[str] = set()  # problems whose solver has begun at an earlier solution

    def of(
        self,
        name: str,
        states: Mapping[str, State],
        records: Mapping[str, Sequence[Step]],
        batches: Sequence[Any],
        kind: str,
        targets: Collection[str],
        count: int,
        later: bool = False,
    ) -> Taken:
        """The gradient of problem ``name``'s loss for its variables, through its best responses.

        Args:
            states: the state of every problem.
            records: the steps of the lower problems that the backward pass goes through.
            batches: what the loss is the mean over; one graph is alive at a time.
            kind: what the pass is for, as it is counted.
            targets: what this step will later be pulled back onto; their outputs are then cached.
            count: how many steps the problem had taken before.
            later: whether it took some of them since the recorded steps of the lower problems.

        Raises:
            GraphError: if no gradient reaches the problem's variables, or a declared read.
        """
        level, role = self._levels[name], self._plan.roles[name]
        state, reads, lower = states[name], {}, role.lower
        for read in level.reads:
            reads[read] = states[read]
        alone = bool(targets) and len(batches) == 1
        keep = alone and role.keeps_graph and not state.live
        # under float16, cotangents between problems would vanish
        cache = ReadCache(level.device) if alone and not keep and level.scale is None else None
        # with a path through lower problems, its gradient is not that of the loss which products are taken of
        needs_base = alone and not role.paths and role.recording.base
        of = (name, *lower)
        if needs_base or (cache is not None and lower):
            of = tuple(dict.fromkeys((*of, *[target for target in targets if target in reads])))
        point = Point(level, state, reads, tuple(map(MicroBatch, batches)), count, cache=cache)
        at_leaves = cache is not None and bool(lower or needs_base)
        several = role.recording.last != 1
        done = gradient(point, Wanted(of, kind, targets, keep, several, at_leaves))
        own, graph = done.found[name], None
        if keep:
            graph = state.variables, filled(own, state.variables)
            own = [None if each is None else each.detach() for each in own]
        if role.paths:
            found = done.found if cache is None or not lower else pulled(point, cache, done)
            own = _sum(own, self._through(level, states, records, found, real=kind == "step"))
        elif not any(map(is_not, own, repeat(None))):
            raise self._no_gradient(name)
        point = point._replace(micro=done.micro)
        if role.inner:
            inner = {low: records[low] for low in role.inner}
            deeper = {read for steps in inner.values() for read in steps[0].point.reads} - {name, *inner}
            point = point._replace(inner=inner, apart=later, reads=reads | {read: states[read] for read in deeper})
        kept = bool(role.paths or targets)
        taken = Taken(done.loss, own, done.buffers, point, done if needs_base else None, graph, kept)
        return taken if self._alone else taken.over_processes()

    def loss(self, name: str, states: Mapping[str, State], batches: Sequence[Any]) -> Tensor:
        """The loss of problem ``name``: the mean over the batches, detached."""
        level, state, losses = self._levels[name], states[name], []
        for batch in batches:
            at = {**states, name: state}
            count = level.problem.step_number
            loss, buffers, _ = evaluate(
                loss_of, level, at, MicroBatch(batch), (), kind="virtual", count=count, autocast=True
            )
            losses.append(loss.detach())
            state = state._replace(buffers=buffers)
        return torch.stack(losses).mean()

    def _through(
        self,
        level: Level,
        states: Mapping[str, State],
        records: Mapping[str, Sequence[Step]],
        found: Mapping[str, Found],
        real: bool,
    ) -> Vector | None:
        """The part of a gradient that flows through the training of lower problems."""
        name, plan = level.name, self._plan
        role, cotangents = plan.roles[name], {}
        for read in role.lower:
            cotangent = reached(found[read], states[read].variables)
            if cotangent is not None:
                cotangents[read] = cotangent
            elif read not in level.problem.node.sometimes:
                raise unreached(name, read)
        warm, reports = dict(self.warm.get(name, {})), dict[str, Tensor]()
        self._continued |= warm.keys()
        answer = backward(name, role.paths, cotangents, records, plan.estimators, self.pullbacks, reports, warm)
        self.latest = reports
        if reports and all(map(vectors.readable, reports.values())):
            self.numbers()
        if real:
            self.reports |= reports
        if real and warm:
            self.warm[name] = warm
        return answer

    def numbers(self) -> dict[str, float]:
        """:attr:`latest` as numbers, for which this waits. Warns once for each problem whose system is not solved."""
        found = {key: float(value) for key, value in self.latest.items()}
        for key, residual in found.items():
            name, _, what = key.rpartition("/")
            estimator = self._plan.estimators[name]
            most = 1.0 if getattr(estimator, "warm_start", False) else UNSOLVED  # which takes rounds to solve it
            solved = residual <= most and (residual < 1 or name not in self._continued)
            if what == "residual" and name not in self._warned and not solved:
                self._warned.add(name)
                remedy = f"; to solve it better, {estimator.remedy}" if estimator.remedy else ""
                system = ", of the Hessian plus the damping," if getattr(estimator, "damping", None) else ""
                warnings.warn(
                    f"problem {name!r}: the linear system of {name_of(estimator)!r}{system} is not solved: its "
                    f"relative residual is {residual:.2g} (0 is exact, and 1 no better than no solution), so "
                    f"hypergradients through {name!r} are inaccurate{remedy}",
                    stacklevel=users_line()[2],
                )
        return found

    def state_dict(self) -> dict[str, Any]:
        """Warm starts and reports."""
        warm = {upper: {name: list(v) for name, v in warm.items()} for upper, warm in self.warm.items()}
        return {"warm": warm, "reports": dict(self.reports)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self.warm = {
            upper: {name: tuple(part.to(device) for part in solution) for name, solution in warm.items()}
            for upper, warm in state["warm"].items()
        }
        self.reports = {key: value.to(device) for key, value in state["reports"].items()}

    def _no_gradient(self, name: str) -> GraphError:
        if self._plan.graph.is_upper(name) and not self._plan.paths[name]:
            return GraphError(
                f"problem {name!r}: with first_order nothing is differentiated through lower problems, and its loss "
                "does not depend directly on its own parameters; choose another estimator, such as 'one_step'"
            )
        return GraphError(
            f"problem {name!r}: no gradient of its loss reaches its own parameters; compute the loss from self(...), "
            f"or check the order of the list, which must be lowest level first: {', '.join(self._plan.graph.names)}"
        )


def _sum(own: Found, indirect: Vector | None) -> Found:
    if indirect is None or not any(map(is_not, own, repeat(None))):
        return own if indirect is None else indirect
    return [s if o is None else o + s for o, s in zip(own, indirect, strict=True)]
