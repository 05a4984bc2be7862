"""A point: all that one evaluation of a level's loss depends on; and its gradient there."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Optimizer, SparseAdam

from mlo.levels.read_cache import ReadCache
from mlo.levels.state import State
from mlo.ops.rng import Randomness
from mlo.ops.vectors import Vector, dense, filled, has_others
from mlo.steps import compiled
from mlo.steps.autograd_graph import saved_bytes
from mlo.steps.evaluation import MicroBatch, evaluate
from mlo.steps.level import Level
from mlo.steps.losses import Found, gradient_of
from mlo.steps.operators import first_evaluation, reraise
from mlo.steps.scan import retaken, shifted

if TYPE_CHECKING:
    from mlo.steps.step import Step


NOTHING: Mapping[str, Any] = {}


class Gradient(NamedTuple):
    """A level's loss and its gradient at a point.

    Attributes:
        loss: the mean over the micro-batches, detached.
        found: {problem: its gradients, by position; None where the loss does not depend on a variable}.
        leaves: the gradients for the outputs that the read cache cut out of the graph.
        buffers: the module's after the evaluations.
        micro: what it was evaluated on.
    """

    loss: Tensor
    found: Mapping[str, Found]
    leaves: Found
    buffers: Vector
    micro: tuple[MicroBatch, ...]


class Point(NamedTuple):
    """Where a level's loss is evaluated. With several micro-batches, it is their mean.

    Attributes:
        level: whose loss.
        state: the level's own.
        reads: {problem: state}, of the problems that the loss reads, and that the ``inner`` steps read.
        micro: what it is evaluated on, one after another.
        step_number: how many steps the problem had taken before.
        inner: {lower problem: its recorded steps}, lowest first, that are part of the loss: they are taken again under
            the level's own variables.
        apart: whether the ``inner`` steps had read other variables of the level than those in ``state``, as at a later
            one of its steps. The gradient is then for a shift of both, and its derivative for ``state`` alone.
        shift: what is added to both, if they are ``apart``; the gradient is then for ``state`` alone.
        autocast: evaluate under the problem's own autocast, if it has one.
        cache: keeps the outputs of the problems read, for further evaluations.
    """

    level: Level
    state: State
    reads: Mapping[str, State]
    micro: tuple[MicroBatch, ...]
    step_number: int
    inner: Mapping[str, Sequence[Step]] = NOTHING
    apart: bool = False
    shift: Vector | None = None
    autocast: bool = True
    cache: ReadCache | None = None

    def at(self, variables: Vector) -> Point:
        """The same point but for the level's own variables."""
        return self._replace(state=self.state._replace(variables=variables, live=False))

    def parts(self) -> list[Point]:
        """Points of one micro-batch each."""
        return [self._replace(micro=(micro,)) for micro in self.micro] if len(self.micro) > 1 else [self]


class Wanted(NamedTuple):
    """Which gradient is taken, and for what.

    Attributes:
        of: the problems for whose variables the loss is differentiated.
        kind: what the passes are counted as.
        reached: further problems that the loss depends on, as when their outputs are cached.
        keep_graph: keep the gradient's own graph; of one micro-batch.
        through_own: whether that graph will be differentiated for the level's own variables.
        at_leaves: differentiate for the outputs that the cache cuts out of the graph, too. Of several micro-batches,
            these are taken on to the problems ``of``.
    """

    of: Sequence[str]
    kind: str = "product"
    reached: Collection[str] = ()
    keep_graph: bool = False
    through_own: bool = True
    at_leaves: bool = False


def gradient(point: Point, wanted: Wanted) -> Gradient:
    """The gradient of the loss at a point. A micro-batch not yet evaluated draws from the present random state.

    Raises:
        GraphError: if the loss cannot be differentiated.
    """
    if len(point.micro) > 1:
        return _mean_gradient(point, wanted)
    level, micro = point.level, point.micro[0]
    if micro.randomness is not None:
        return Gradient(*_evaluated(point, micro, wanted), (micro,))
    at = micro._replace(randomness=Randomness.capture(level.device, level.draws_outside))
    if level.scale is None or not point.autocast:
        return Gradient(*_evaluated(point, micro, wanted), (at,))
    scale = replace(level.scale)
    at = at._replace(scale=scale.value)
    done = _evaluated(point, micro._replace(scale=at.scale), wanted)
    while not scale.accepts([g for found in done[1].values() for g in found if g is not None]):
        at = at._replace(scale=scale.value)
        done = _evaluated(point, at, wanted)
    if wanted.kind == "step":  # a virtual step has no side effects
        level.scale = scale
    return Gradient(*done, (at,))


def _mean_gradient(point: Point, wanted: Wanted) -> Gradient:
    count = len(point.micro)
    losses: list[Tensor] = []
    micros: list[MicroBatch] = []
    total: dict[str, list[Tensor | None]] = {}
    buffers: Vector = point.state.buffers
    for index, micro in enumerate(point.micro):
        cache = ReadCache(point.level.device) if wanted.at_leaves else None
        at = micro._replace(buffers=buffers) if index and micro.randomness is None else micro
        done = gradient(point._replace(micro=(at,), cache=cache), wanted)
        found = done.found if cache is None else pulled(point, cache, done)
        for name, parts in found.items():
            so_far = total.get(name, [None] * len(parts))
            total[name] = [_running(s, g, count) for s, g in zip(so_far, parts, strict=True)]
        losses.append(done.loss)
        micros += done.micro
        buffers = done.buffers
    return Gradient(torch.stack(losses).mean(), total, (), buffers, tuple(micros))


def pulled(point: Point, cache: ReadCache, done: Gradient) -> Mapping[str, Found]:
    """The gradients, with those of the cached outputs taken on to the problems read."""
    names = [name for name in done.found if name != point.level.name]
    inputs = [variable for name in names for variable in point.reads[name].variables]
    direct = [gradient for name in names for gradient in done.found[name]]
    rest, found = iter(cache.pull(done.leaves, inputs, direct)), dict(done.found)
    for name in names:
        found[name] = [next(rest) for _ in done.found[name]]
    return found


def _running(total: Tensor | None, gradient: Tensor | None, count: int) -> Tensor | None:
    """The sum of gradients, each divided by their number."""
    if gradient is None:
        return total
    return gradient / count if total is None else total.add_(gradient, alpha=1 / count)


def _evaluated(point: Point, micro: MicroBatch, wanted: Wanted) -> tuple[Tensor, dict[str, Found], Found, Vector]:
    """The loss, the gradients of each problem and at the cached outputs, and the buffers afterwards."""
    of, keep_graph = wanted.of, wanted.keep_graph
    level = point.level
    if point.inner:
        states, inputs = states_at(point, micro)
    else:
        own = point.state if micro.buffers is None else point.state._replace(buffers=micro.buffers)
        states, inputs = {**point.reads, level.name: own}, None
    reached = {*wanted.reached, *of, *point.inner}.difference(level.problem.node.held)
    if level.compiler is not None and compiled.applies(point, keep_graph):
        own_too = keep_graph and wanted.through_own
        done = compiled.gradient(point, states, micro, of, reached, wanted.kind, keep_graph, own_too)
        if done is not None:
            loss, found, buffers = done
            return loss, _by_level(found, of, states), (), buffers
    if level.seen:
        loss, found, buffers = _taken(point, states, inputs, wanted, reached, micro)
    else:
        take = partial(_taken, point, states, inputs, wanted, reached)
        loss, found, buffers = first_evaluation(level, take, micro, states[level.name].variables, keep_graph)
    if not (level.searched or point.inner) and not all([state.live for state in states.values()]):
        level.warn_of_strays(loss, states)  # inner steps would read what they recorded
    if keep_graph and level.graph_bytes is None and not level.recast(point.state):
        level.note_graph(saved_bytes([loss, *found], states.values(), micro.batch), found)
    if has_others(found):
        kept = len(level.problem.variables) if _stays_sparse(level.problem.optimizer, wanted) else 0
        found = [*found[:kept], *dense(found[kept:])]
    parts = _by_level(found, of, states)
    return loss.detach(), parts, found[sum(map(len, parts.values())) :], buffers


def _taken(
    point: Point,
    states: Mapping[str, State],
    inputs: Vector | None,
    wanted: Wanted,
    reached: Collection[str],
    micro: MicroBatch,
) -> tuple[Tensor, Found, Vector]:
    """The loss with its graph, its gradients, and the buffers afterwards."""
    level = point.level
    if point.cache is not None:
        point.cache.begin()
    try:
        with level.differentiable(wanted.keep_graph):
            loss, found, buffers, _ = evaluate(
                gradient_of,
                level,
                states,
                micro,
                wanted.of,
                reached,
                kind=wanted.kind,
                count=point.step_number,
                autocast=point.autocast,
                twice=wanted.keep_graph,
                inputs=inputs,
                keep_graph=wanted.keep_graph,
                scale=micro.scale,
                cache=point.cache,
                moving=point.inner,
                at_leaves=wanted.at_leaves,
            )
    except RuntimeError as error:
        reraise(level, error)
    return loss, found, buffers


def _stays_sparse(optimizer: Optimizer, wanted: Wanted) -> bool:
    """Whether a level's own gradient, which is sparse, is only for its optimizer, which takes it like that."""
    if wanted.keep_graph or wanted.kind not in ("step", "virtual"):
        return False
    if isinstance(optimizer, SparseAdam):
        return True
    stateful = any([group.get("momentum") for group in optimizer.param_groups])  # a sparse buffer takes no dense step
    return not wanted.reached and not stateful and isinstance(optimizer, SGD | Adagrad)


def states_at(point: Point, micro: MicroBatch) -> tuple[dict[str, State], Vector | None]:
    """The states that an evaluation is made in, and what its own gradient is taken for, if not for its variables.

    Inner steps are taken again here. With a point that is ``apart`` from what they read, both are shifted together.
    """
    own, name = point.state, point.level.name
    if micro.buffers is not None:
        own = own._replace(buffers=micro.buffers)
    states = {**point.reads, name: own}
    inputs, shifts = None, {}
    if point.apart:
        states[name], inputs = shifted(own, point.shift)
        shifts = {name: inputs}
        inputs = inputs if point.shift is None else own.variables
    above = {read: state for read, state in states.items() if read not in point.level.below}
    return {**states, **retaken(point.inner, above, {}, shifts)}, inputs


def _by_level(found: Found, of: Sequence[str], states: Mapping[str, State]) -> dict[str, Found]:
    parts, begin = {}, 0
    for name in of:
        end = begin + len(states[name].variables)
        parts[name] = found[begin:end]
        begin = end
    return parts


def own_gradient(point: Point) -> Vector:
    """The gradient in the level's own variables; one pass for each micro-batch."""
    name = point.level.name
    return filled(gradient(point, Wanted((name,))).found[name], point.state.variables)
