"""The backward pass over levels: reverse-mode differentiation whose nodes are problems, each pulled back once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mlo.errors import ConfigError, GraphError
from mlo.hypergradient.estimators.base import Estimator, Pulled
from mlo.ops.vectors import Vector, add
from mlo.steps.operators import WITHOUT_SECOND
from mlo.steps.point import Point, Wanted, gradient, pulled
from mlo.steps.step import Step, reached


def backward(
    top: str,
    paths: Mapping[str, tuple[str, ...]],
    cotangents: Mapping[str, Vector],
    records: Mapping[str, Sequence[Step]],
    estimators: Mapping[str, Estimator],
    pullbacks: Counter[str],
    metrics: dict[str, Tensor],
    warm: dict[str, Vector],
) -> Vector | None:
    """The part of the gradient of ``top`` that flows through the training of lower problems.

    A cotangent is the derivative of the top's loss with respect to the variables of a problem, one tensor per variable.
    The lower problems are visited from the highest level to the lowest. Each is pulled back once: its estimator maps
    its cotangent to cotangents of the problems that its loss reads, which are added up.

    Args:
        top: the problem whose hypergradient is computed.
        paths: {lower problem: problems that it is pulled back onto}, highest first
            (:meth:`mlo.levels.graph.Graph.paths`).
        cotangents: {lower problem: its cotangent}, for those that the top's loss reads directly.
        records: {lower problem: its recorded steps, in order}.
        estimators: {lower problem: its estimator}.
        pullbacks: incremented by one for each problem visited.
        metrics: receives the metrics of the estimators, as "<problem>/<name>".
        warm: {problem: solution to start from}; receives the solutions for the next call.

    Returns:
        One tensor per variable of ``top``; None if no gradient reaches it.

    Raises:
        GraphError: if a declared read carries no gradient.
    """
    waiting: dict[str, Vector] = dict(cotangents)
    for name, targets in paths.items():
        if name not in waiting:  # nothing above it depends on it
            continue
        steps = records[name]
        back = _pulled(top, name, estimators[name], steps, waiting.pop(name), targets, warm.get(name))
        pullbacks[name] += 1
        for key, value in back.metrics.items():
            metrics[f"{name}/{key}"] = value
        if back.solution is not None:
            warm[name] = back.solution
        for target in targets:
            found = back.cotangents[target]
            if found is not None:
                waiting[target] = add(waiting[target], found) if target in waiting else found
            elif target not in steps[-1].point.level.problem.node.sometimes and not _depends(steps[-1], target):
                raise unreached(name, target)
    return waiting.get(top)


def _pulled(top: str, name: str, estimator: Estimator, *arguments: Any) -> Pulled:
    """What an estimator's :meth:`pull` returns, with errors that name the problem."""
    try:
        back = estimator.pull(*arguments)
    except torch.OutOfMemoryError as error:
        error.add_note(f"Memory ran out while {top!r} was differentiated through the training of {name!r}.")
        raise
    except NotImplementedError as error:
        raise _no_second_derivative(name, error) from error
    if not isinstance(back, Pulled):
        raise ConfigError(
            f"problem {name!r}: pull of {type(estimator).__name__} returned a {type(back).__name__}; return "
            "mlo.Pulled({target: one tensor per variable, or None})"
        )
    return back


def _no_second_derivative(name: str, error: NotImplementedError) -> ConfigError:
    """The error for an operator of torch without a second derivative, or without one for sparse tensors."""
    reason = str(error).strip().partition("\n")[0]
    if "Sparse" in reason:
        reason, instead = "a gradient is sparse", "pass sparse=False to its embedding, or use the product 'exact'"
    else:
        instead = f"replace it, or {WITHOUT_SECOND}"
    return ConfigError(f"problem {name!r}: a second derivative of its loss cannot be computed: {reason}; {instead}")


def _depends(step: Step, target: str) -> bool:
    """Whether the loss of a step depends on what it reads of ``target``; this takes passes if it is not known yet.

    The loss may depend on it while the loss's gradient does not. Then nothing flows back, which is right.
    """
    level = step.point.level
    if target not in level.depends_on:
        if not any([_reaches(point, target) for point in step.at_solution().parts()]):
            return False
        level.depends_on.add(target)
    return True


def _reaches(point: Point, target: str) -> bool:
    """Whether the loss at a point, of one micro-batch, has a gradient for ``target``."""
    done = gradient(point, Wanted((target,), at_leaves=True))
    found = done.found if point.cache is None else pulled(point, point.cache, done)
    return reached(found[target], point.reads[target].variables) is not None


def unreached(name: str, read: str) -> GraphError:
    """The error for a declared read that carries no gradient."""
    return GraphError(
        f"problem {name!r}: its loss reads {read!r}, but no gradient flows through that read. Check that the loss uses "
        f"it, calls the problem {read!r} and not its module, and does not use no_grad, detach or argmax, and that the "
        f"optimizer of {read!r} holds the parameters. If the read is meant as a constant, pass held=({read!r},) to "
        f"{name!r}"
    )
