"""The gradient of one problem's loss at one state, through the training of lower problems where it is an upper one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mlo.errors import GraphError
from mlo.hypergradient.backward import backward, unreached
from mlo.hypergradient.step import Record
from mlo.levels.problem import Problem, State
from mlo.levels.read_cache import ReadCache
from mlo.ops import distributed
from mlo.ops.loss_scale import LossScale
from mlo.ops.vectors import Vector, filled
from mlo.steps.evaluation import Evaluator
from mlo.steps.gradient_functions import MicroBatch, Pass, mean
from mlo.steps.optimizer import is_linear, needs_only_state_after
from mlo.steps.optimizer_state import OptimizerState
from mlo.training.plan import Plan

Records = dict[str, list[Record]]


@dataclass(frozen=True)
class Gradient:
    """A problem's gradient at one state, with what a record of the step keeps of its evaluation.

    Attributes:
        loss: detached, on the device.
        own: {variable: its gradient, None where the loss does not reach it}.
        buffers: the module's buffers after the evaluation.
        micro: what it was evaluated on.
        kept: whether a record is to keep it: for the last step, and where it runs through lower problems.
        read_cache, base, inner, graph: see :class:`mlo.hypergradient.step.Record`.
    """

    loss: Tensor
    own: dict[str, Tensor | None]
    buffers: Mapping[str, Tensor]
    micro: tuple[MicroBatch, ...]
    read_cache: ReadCache | None
    base: dict[Tensor, Tensor] | None
    inner: Mapping[str, Sequence[Record]]
    kept: bool
    graph: tuple[Vector, Vector] | None

    def over_processes(self, like: Sequence[Tensor]) -> Gradient:
        """That of the mean of all processes' losses, each on its own batch; the buffers are the first process's.

        Averaged before anything is done with it, a loss that is not finite in one process is so in all.

        Args:
            like: tensors of the gradients' shapes.
        """
        if distributed.world() == 1:
            return self
        sent = filled(self.own.values(), like)
        reached = self.loss.new_ones(len(sent))
        for index, gradient in enumerate(self.own.values()):
            if gradient is None:
                reached[index] = 0
        loss, reached, *found = distributed.average([self.loss, reached, *sent])
        mine = [gradient is not None for gradient in self.own.values()]
        reaches = mine if all(mine) else (reached > 0).tolist()  # None only where no process's loss reaches it
        own = {name: each if there else None for name, each, there in zip(self.own, found, reaches, strict=True)}
        buffers = dict(zip(self.buffers, distributed.copies(list(self.buffers.values())), strict=True))
        return replace(self, loss=loss, own=own, buffers=buffers)

    def record(
        self,
        problem: Problem,
        before: State | None,
        optimizer_state: OptimizerState | None,
        after: State,
        states: Mapping[str, State],
        fresh: Sequence[Any] = (),
    ) -> Record:
        """A record of the step taken with this gradient; ``fresh`` are batches for the curvature at the solution.

        Where the gradient itself is not kept, the loss gives it again.
        """
        deeper = [read for records in self.inner.values() for read in records[0].reads]
        names = {*problem.node.reads, *deeper} - {problem.name, *self.inner}
        return Record(
            problem,
            before,
            after,
            self.own if self.kept else None,
            optimizer_state,
            self.micro,
            {read: states[read] for read in names},
            unreached=frozenset(name for name, found in self.own.items() if found is None),
            fresh=tuple(
                MicroBatch(batch, m.randomness, step=m.step) for batch, m in zip(fresh, self.micro, strict=False)
            ),
            read_cache=self.read_cache,
            base=self.base,
            inner=self.inner,
            graph=self.graph,
        )


class Gradients:
    """Takes gradients for an engine.

    Attributes:
        pullbacks: {problem: how often a cotangent was pulled back through it}.
        reports: {"<problem>/<name>": scalar tensor}, what the last pullbacks of real steps reported.
        latest: the same of the last backward pass, real or virtual.
        scales: {problem: the scale of its loss}, of those under float16.
        warm: {upper problem: {lower: the solution that its last real step left}}.
    """

    def __init__(self, plan: Plan, evaluator: Evaluator) -> None:
        self._plan = plan
        self._evaluator = evaluator
        self.pullbacks: Counter[str] = Counter()
        self.reports: dict[str, Tensor] = {}
        self.latest: dict[str, Tensor] = {}
        self.scales: dict[str, LossScale] = {}
        self.warm: dict[str, dict[str, Vector]] = {}

    def of(
        self,
        name: str,
        states: Mapping[str, State],
        records: Mapping[str, Sequence[Record]],
        batches: Sequence[Any],
        kind: str,
        targets: Collection[str],
    ) -> Gradient:
        """The gradient of problem ``name``'s loss for its variables, through its best responses.

        Args:
            states: the state of every problem.
            records: the steps of the lower problems that the backward pass goes through.
            batches: what the loss is the mean over; one graph is alive at a time.
            kind: what the pass is for, as it is counted.
            targets: what this step will later be pulled back onto; their outputs are then cached.

        Raises:
            GraphError: if no gradient reaches the problem's variables, or a declared read.
        """
        paths, alone = self._plan.paths[name], len(batches) == 1
        # with a path through lower problems, its gradient is not that of the loss which products are taken of
        needs_base = bool(targets) and alone and not paths and self._plan.estimators[name].needs_base
        lower = self._plan.lower[name]
        keep = bool(targets) and alone and self._keeps_graph(name) and not states[name].live
        # under float16, cotangents between problems would vanish
        half = self._evaluator.problems[name].autocast is torch.float16
        read_cache = ReadCache() if targets and alone and not keep and not half else None
        down_to = targets if needs_base or (read_cache is not None and lower) else ()
        of = tuple(dict.fromkeys((name, *lower, *down_to)))
        options = {"of": of, "through": targets, "leaves": bool(down_to), "keep_graph": keep, "read_cache": read_cache}
        micro, done = self._accumulated(name, states, batches, kind, options)
        point, found, graph = self._variables(states, (name,)), done.gradients, None
        if keep:
            graph = tuple(point), filled((found.get(v) for v in point), point)
            found = {tensor: gradient.detach() for tensor, gradient in found.items()}
        base = None
        if needs_base and read_cache is not None:
            base = {
                tensor: found[tensor]
                for tensor in (*read_cache.leaves, *self._variables(states, targets))
                if tensor in found
            }
        if read_cache is not None and lower:
            found = read_cache.pull(found)
        own: list[Tensor | None] = [found.get(v) for v in point]
        if paths:
            cotangents = {}
            for read in lower:
                variables = self._variables(states, (read,))
                reached = [found.get(v) for v in variables]
                if all(r is None for r in reached):
                    if read in self._evaluator.problems[name].node.sometimes:
                        continue
                    raise unreached(name, read)
                cotangents[read] = filled(reached, variables)
            own = _sum(own, self._backward(name, cotangents, records, real=kind == "step"))
        elif all(g is None for g in own):
            raise self._no_gradient(name)
        named = dict(zip(self._evaluator.problems[name].variables, own, strict=True))
        inner = {low: records[low] for low in self._plan.inner.get(name, ())}
        kept = bool(paths or targets)
        gradient = Gradient(done.loss, named, done.buffers, micro, read_cache, base, inner, kept, graph)
        return gradient.over_processes(point)

    def seen(self, name: str, states: Mapping[str, State], stored: State | None) -> Mapping[str, State]:
        """``states`` with a problem's stored copy instead of its own tensors, if a graph must outlive its step."""
        here = stored is not None and stored.device == states[name].device
        return {**states, name: stored} if stored is not None and here and self._keeps_graph(name) else states

    def kept_for_pullback(self, name: str, index: int, left: int) -> bool:
        """Whether what a step computes is kept: the last one's, and earlier graphs while memory lasts for them.

        Args:
            index, left: steps of the round that were recorded before it, and that come after it.
        """
        if left == 0:
            return True
        size = self._evaluator.graph_bytes.get(name, math.inf)  # known once a last step's was kept
        return self._keeps_graph(name) and (index + 1) * size <= self._plan.estimators[name].graph_bytes

    def at_once(self, name: str, states: Mapping[str, State], taken: int, left: int) -> int:
        """How many of a problem's next steps are recorded as one, in one graph; 0: the next one is recorded alone.

        Args:
            taken, left: steps of the round that were recorded before them, and that are yet to be taken.
        """
        problem, estimator = self._evaluator.problems[name], self._plan.estimators[name]
        size = self._evaluator.graph_bytes.get(name)  # known once a last step's was kept
        if size is None or not (estimator.in_one_graph and self._keeps_graph(name) and problem.accumulate == 1):
            return 0
        if self.needs_optimizer_state(name) or not all(
            states[name].parameters[v].requires_grad for v in problem.variables
        ):
            return 0
        room = estimator.graph_bytes / max(size, 1)
        return self._evaluator.at_once(name, states, left if room >= taken + left else int(room) - taken)

    def needs_optimizer_state(self, name: str) -> bool:
        """Whether a record of the problem's steps needs the values in its optimizer's state before them."""
        if self._takes_again(name):
            return True
        return not (is_linear(self._evaluator.problems[name]) or self.needs_only_state_after(name))

    def needs_only_state_after(self, name: str) -> bool:
        """Whether a record of the problem's last step, the only one recorded, can do with the state after it."""
        last_alone = not self._plan.estimators[name].records(1) and not self._takes_again(name)
        return last_alone and needs_only_state_after(self._evaluator.problems[name])

    def _takes_again(self, name: str) -> bool:
        inner = any(name in lows for lows in self._plan.inner.values())
        return inner or self._plan.estimators[name].repeats

    def _accumulated(
        self, name: str, states: Mapping[str, State], batches: Sequence[Any], kind: str, options: dict[str, Any]
    ) -> tuple[tuple[MicroBatch, ...], Pass]:
        """The mean over the batches, one after another, and what each was evaluated on."""
        micro: list[MicroBatch] = []
        step = self._evaluator.problems[name].steps_taken

        def passes() -> Iterator[Pass]:
            buffers = None
            for batch in batches:
                at = MicroBatch(batch, self._evaluator.capture(name), buffers, step=step)
                here = {**states, name: at.state(states[name])}
                once = partial(self._evaluator.differentiate, name, here, batch, kind=kind, **options)
                if self._evaluator.problems[name].autocast is torch.float16:
                    scale = replace(self.scales.get(name, LossScale()))
                    done = once(scale=scale.value)
                    while not scale.accepts(done.gradients.values()):
                        done = once(scale=scale.value, randomness=at.randomness)
                    at = replace(at, scale=scale.value)
                    if kind == "step":  # a virtual step has no side effects
                        self.scales[name] = scale
                else:
                    done = once()
                micro.append(at)
                buffers = done.buffers
                yield done

        done = mean(passes(), len(batches))
        return tuple(micro), done

    def _keeps_graph(self, name: str) -> bool:
        plain = not self._plan.paths[name] and self._evaluator.problems[name].autocast is None
        return plain and self._plan.estimators[name].keeps_graph

    def _backward(
        self, name: str, cotangents: Mapping[str, Vector], records: Mapping[str, Sequence[Record]], real: bool
    ) -> Vector | None:
        plan, warm, reports = self._plan, dict(self.warm.get(name, {})), dict[str, Tensor]()
        found = backward(
            name,
            plan.paths[name],
            cotangents,
            records,
            plan.estimators,
            self._evaluator,
            self.pullbacks,
            reports,
            warm,
        )
        self.latest = reports
        if real:
            self.reports |= reports
        if real and warm:
            self.warm[name] = warm
        return found

    def _variables(self, states: Mapping[str, State], names: Collection[str]) -> list[Tensor]:
        return [states[n].parameters[v] for n in names for v in self._evaluator.problems[n].variables]

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


def _sum(own: Sequence[Tensor | None], indirect: Vector | None) -> list[Tensor | None]:
    if indirect is None:
        return list(own)
    return [s if o is None else o + s for o, s in zip(own, indirect, strict=True)]
