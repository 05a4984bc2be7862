"""The backward pass over levels: reverse-mode differentiation with problems as the nodes, each pulled back once."""

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
    """The part of ``top``'s gradient that runs through the training of lower problems.

    Args:
        paths: {lower problem: what it is pulled back onto}, highest first (:meth:`mlo.levels.graph.Graph.paths`).
        cotangents: {lower problem: derivative of the top's loss for its variables}, where its loss reads it.
        records: the recorded steps of each problem in ``paths``, the last one last.
        pullbacks: counts one for each problem visited.
        metrics: takes what the estimators report, as "<problem>/<name>".
        warm: {problem: solution to begin with}; takes the solutions that estimators leave for the next time.

    Raises:
        GraphError: if a read that the graph declares carries no gradient.
    """
    waiting: dict[str, Vector] = dict(cotangents)
    for name, targets in paths.items():
        if name not in waiting:  # nothing above it depends on it after all
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
                continue  # it reads it, but its gradient does not depend on it
            waiting[target] = add(waiting[target], found) if target in waiting else found
    return waiting.get(top)


def unreached(name: str, read: str) -> GraphError:
    """The error of a declared read that carries no gradient."""
    return GraphError(
        f"problem {name!r}: its loss reads {read!r}, but no gradient flows through that read; is it used, called "
        "as a problem rather than by its module, on parameters that its optimizer holds, and not under no_grad, detach "
        f"or argmax? If it is meant as a constant, pass held=({read!r},) to {name!r}"
    )
