"""The backward pass over levels: reverse-mode differentiation whose nodes are problems, each pulled back once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor

from mlo.errors import GraphError
from mlo.hypergradient.estimators.base import Estimator
from mlo.hypergradient.step import Record, Step
from mlo.ops.vectors import Vector, add
from mlo.steps.evaluation import Evaluator


def backward(
    top: str,
    paths: Mapping[str, tuple[str, ...]],
    cotangents: Mapping[str, Vector],
    records: Mapping[str, Sequence[Record]],
    estimators: Mapping[str, Estimator],
    evaluator: Evaluator,
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
        evaluator: evaluates the losses of the problems.
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
        steps = [Step(record, targets, evaluator, warm.get(name)) for record in records[name]]
        pulled = estimators[name].pull(steps, waiting.pop(name))
        pullbacks[name] += 1
        metrics.update({f"{name}/{key}": value for key, value in pulled.metrics.items()})
        if pulled.solution is not None:
            warm[name] = pulled.solution
        for target in targets:
            found = pulled.cotangents[target]
            if found is None:
                if not steps[-1].depends_on(target):
                    raise unreached(name, target)
                continue  # its loss reads the target, but its gradient does not depend on it
            waiting[target] = add(waiting[target], found) if target in waiting else found
    return waiting.get(top)


def unreached(name: str, read: str) -> GraphError:
    """The error for a declared read that carries no gradient."""
    return GraphError(
        f"problem {name!r}: its loss reads {read!r}, but no gradient flows through that read. Check that the loss uses "
        f"it, calls the problem {read!r} and not its module, and does not use no_grad, detach or argmax, and that the "
        f"optimizer of {read!r} holds the parameters. If the read is meant as a constant, pass held=({read!r},) to "
        f"{name!r}"
    )
