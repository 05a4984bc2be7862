"""What needs less memory, for an error that says that a GPU has run out of it."""

from __future__ import annotations

from mlo.hypergradient import Estimator, Product
from mlo.training.plan import Plan


def advice(plan: Plan) -> str:
    """For each problem that is differentiated through, its estimator and what keeps less; and smaller batches."""
    through = {name for paths in plan.paths.values() for name in paths}
    lines = ["What needs less memory:"]
    for name in plan.graph.names:
        if name in through:
            estimator = plan.estimators[name]
            lines.append(f"- {name!r} is differentiated by {estimator!r}. {_cheaper(estimator)}")
    lines.append(
        "- Problem(..., accumulate=2), with data in batches of half the size: a step then evaluates its loss on one "
        "after the other, with the same gradient unless the loss or module depends on the batch as a whole"
    )
    return "\n".join(lines)


def _cheaper(estimator: Estimator) -> str:
    recording, product = estimator.recording, getattr(estimator, "product", None)
    steps = []
    if recording.last != 1:
        steps.append("'truncated' with a small option 'steps'")
    if recording.graph_bytes:
        steps.append("graph_memory=0")
    if recording.last != 1 and recording.store_on == "device":
        steps.append("store_on='cpu'")
    if isinstance(product, Product) and product.keeps_graph:
        steps.append("'darts' or 'sama', which keep no graph of a gradient")
    return f"Less: {'; '.join(steps)}." if steps else "It keeps no graph of a gradient."
