"""The functions of :mod:`mlo.steps.losses` and :mod:`mlo.steps.scan` as compiled code, and when that is possible."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from mlo.levels.batch_trees import opened
from mlo.levels.state import State, leaves
from mlo.ops.compiler import SMALL_GRAPH, STEPS
from mlo.ops.rng import Randomness
from mlo.ops.vectors import Vector
from mlo.steps.evaluation import MicroBatch, evaluate
from mlo.steps.level import Level
from mlo.steps.losses import Found, gradient_for_reads, gradient_of, product_of
from mlo.steps.optimizer import Groups
from mlo.steps.scan import steps_of

if TYPE_CHECKING:
    from mlo.steps.point import Point


def applies(point: Point, keep_graph: bool = False) -> bool:
    """Whether a pass at the point may be compiled: not before one has shown that this is possible."""
    level = point.level
    if level.compiler is None or point.inner or (keep_graph and level.graph_bytes is None):
        return False
    return level.compiles(point.state)


def gradient(
    point: Point,
    states: Mapping[str, State],
    micro: MicroBatch,
    of: Sequence[str],
    reached: Collection[str],
    kind: str,
    keep_graph: bool,
    through_own: bool,
) -> tuple[Tensor, Found, Vector] | None:
    """The loss, its gradients and the buffers, by compiled code; None if it cannot be compiled.

    Args:
        through_own: whether the kept graph is differentiated for the level's own variables.
    """
    level = point.level
    # of a variable that the loss does not reach, it would give zeros: not for a loss that may change with its step
    steady = level.reaches_all and not level.problem.asks_steps_taken
    if keep_graph and not through_own and steady and tuple(of) == (level.name,):
        what = "gradient with its graph for what is read"
        done = _run(point, states, micro, what, of, gradient_for_reads, (tuple(of),), reached, kind, {}, True, True)
        if done is not None:
            return done
    what = "gradient with its graph" if keep_graph else "gradient"
    options = {"keep_graph": keep_graph}
    return _run(point, states, micro, what, of, gradient_of, (tuple(of),), reached, kind, options, keep_graph)


def product(
    point: Point,
    states: Mapping[str, State],
    micro: MicroBatch,
    vector: Vector,
    of: Sequence[str],
    reached: Collection[str],
    kind: str,
) -> Found | None:
    """A curvature product as a whole, with nothing kept, and only for ``of``; None if it cannot be compiled."""
    done = _run(point, states, micro, "product", of, product_of, (vector, tuple(of)), reached, kind, {}, False)
    return None if done is None else done[1]


def _run(
    point: Point,
    states: Mapping[str, State],
    micro: MicroBatch,
    what: str,
    of: Sequence[str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    reached: Collection[str],
    kind: str,
    options: dict[str, Any],
    keep_graph: bool,
    spare: bool = False,
) -> tuple[Tensor, Found, Vector] | None:
    level, compiler = point.level, point.level.compiler
    assert compiler is not None
    lowered = level.problem.autocast if point.autocast else None
    names = frozenset(reached)
    second = keep_graph or function is product_of
    # a captured pass repeats the kernels that it was captured with, which differ between steps and products
    in_full = level.device.type == "cuda" and (second or kind == "product")
    key = (level.name, what, tuple(of), tuple(sorted(names)), in_full, lowered)
    if key not in compiler:
        compiler.add(key, _function(level, function, names, options, lowered), leaves_graph=keep_graph)
    wanted = {*of, level.name}
    passed = {
        # without a kept graph, pass fresh leaves, so that live parameters and copies share one compiled function
        name: state._replace(
            variables=state.variables if keep_graph else _fresh(state.variables, name in wanted), slots=(), live=False
        )
        for name, state in states.items()
        if name == level.name or name in level.reads
    }
    scale = None if micro.scale == 1.0 else torch.tensor(micro.scale, device=level.device)
    begun = Randomness.capture(level.device)

    def run(*_: Any, **__: Any) -> Any:
        done = compiler.call(key, passed, micro.batch, arguments, scale, spare=spare)
        if done is None:
            raise _NotCompiledError
        return done

    with level.differentiable(second):
        try:
            loss, found, buffers, _ = evaluate(
                run, level, states, micro, kind=kind, count=point.step_number, autocast=False, twice=second
            )
        except _NotCompiledError:
            begun.restore(level.device)  # it may have drawn before it failed
            return None
    return loss, found, buffers


class _NotCompiledError(Exception):
    """Raised out of an evaluation whose function cannot be compiled."""


def _function(
    level: Level,
    function: Callable[..., Any],
    reached: frozenset[str],
    options: dict[str, Any],
    lowered: torch.dtype | None,
) -> Callable[..., Any]:
    kind = level.device.type

    def run(
        states: Mapping[str, State], batch: Any, arguments: tuple[Any, ...], scale: Tensor | None
    ) -> tuple[Tensor, Found, Vector, list[int]]:
        context = torch.autocast(kind, lowered, enabled=lowered is not None)
        by = 1.0 if scale is None else scale
        loss, found, buffers, calls = function(
            level, states, batch, *arguments, reached, scale=by, context=context, **options
        )
        return loss.detach(), found, buffers, calls

    return run


def may_join(level: Level, state: State, wanted: int) -> int:
    """How many of the next ``wanted`` steps of a level are taken in one graph; 0: none."""
    if level.draws_outside or wanted < 2:
        return 0
    if level.compiler is None or level.name in level.compiler.refused or level.recast(state):
        return wanted
    if level.problem.asks_steps_taken or level.graph_bytes is None:
        return 0
    return STEPS if wanted >= STEPS and level.graph_bytes <= SMALL_GRAPH else 0


def steps(
    level: Level, states: Mapping[str, State], batches: Sequence[Any], groups: Groups, reached: Collection[str]
) -> Any:
    """What :func:`mlo.steps.scan.steps_of` returns, by compiled code; None if it cannot be compiled."""
    compiler = level.compiler
    assert compiler is not None
    aliased, forms = zip(*map(_aliased, batches), strict=True)
    if any([form != forms[0] for form in forms]):
        return None
    names = frozenset(reached)
    key = (level.name, f"{len(batches)} steps as one", tuple(sorted(names)), None)
    if key not in compiler:

        def run(states: Mapping[str, State], batches: Sequence[Any], rates: Groups) -> Any:
            end, state, each, losses, calls = steps_of(level, states, batches, rates, names, False)
            return each, end, state, losses, calls

        compiler.add(key, run, leaves_graph=True)
    rates = tuple([{**group, "lr": _scalar(group["lr"], compiler.scalars_on)} for group in groups])
    done = compiler.call(key, states, aliased, rates, spare=True)
    if level.problem.asks_steps_taken:  # found out just now, as after a checkpoint: all of them saw the same count
        return None
    return None if done is None else (done[1], done[2], done[0], done[3], done[4])


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """A tensor that does not share memory."""
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float64, copy=True)
    return torch.full((), value, dtype=torch.float64, device=device)


def described(level: Level) -> tuple[tuple[str, ...], dict[str, str]]:
    """The compiled functions of a level that have run so far, and {function that cannot be compiled: reason}."""
    compiler = level.compiler
    if compiler is None:
        return (), {}
    ran = {_described(key) for key in compiler.ran if key[0] == level.name}
    if level.name in compiler.refused:
        return tuple(sorted(ran)), {"everything": compiler.refused[level.name]}
    failed = {_described(key): reason for key, reason in compiler.failed.items() if key[0] == level.name}
    return tuple(sorted(ran)), failed


def _described(key: Sequence[Any]) -> str:
    """What a compiled function computes, which its key begins with, and in which precision, with which it ends."""
    what, lowered = key[1], key[-1]
    return f"{what} in {str(lowered).removeprefix('torch.')}" if lowered is not None else str(what)


def _fresh(variables: Vector, wanted: bool) -> Vector:
    """Aliases, which require gradients where they are ``wanted``."""
    return leaves(variables) if wanted else tuple([variable.detach() for variable in variables])


def _aliased(batch: Any) -> tuple[Any, tuple[Any, ...]]:
    """The batch with aliases of its tensors, so that compiled code does not depend on shared batches, and its form."""
    parts, structure = tree_flatten(opened(batch))
    form = tuple([(p.shape, p.dtype) if isinstance(p, Tensor) else type(p) for p in parts])
    return tree_unflatten([p.detach() if isinstance(p, Tensor) else p for p in parts], structure), (structure, *form)
