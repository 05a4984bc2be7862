"""Hypergradients: one backward sweep, in which each pullback is a response times a curvature product."""

from __future__ import annotations

from pydantic import ValidationError

from mlo.config import Registered, explain
from mlo.errors import ConfigError
from mlo.hypergradient.products import Central, Exact, Forward, OneSided, Product, ProductOption
from mlo.hypergradient.responses.base import Pulled, Response, ResponseOption
from mlo.hypergradient.responses.implicit import ConjugateGradient, Neumann, Nystrom
from mlo.hypergradient.responses.one_step import Darts, FirstOrder, OneStep, Sama
from mlo.hypergradient.responses.penalty import Penalty
from mlo.hypergradient.responses.unrolled import Truncated, Unrolled
from mlo.hypergradient.step import Curvature, LocalLoss, Step
from mlo.hypergradient.sweep import sweep
from mlo.registry import RESPONSES

__all__ = [
    "Central",
    "ConjugateGradient",
    "Curvature",
    "Darts",
    "Exact",
    "FirstOrder",
    "Forward",
    "LocalLoss",
    "Neumann",
    "Nystrom",
    "OneSided",
    "OneStep",
    "Penalty",
    "Product",
    "ProductOption",
    "Pulled",
    "Response",
    "ResponseOption",
    "Sama",
    "Step",
    "Truncated",
    "Unrolled",
    "estimator",
    "sweep",
]


def estimator(value: object) -> Response:
    """The response that a name, a mapping {"kind": name, **options} or a response itself stands for.

    Raises:
        ConfigError: if the name is not registered (the message lists those that are) or an option does not fit.
    """
    mark = Registered(RESPONSES)
    try:
        built = mark.build(value)
    except ValidationError as error:
        raise ConfigError("hypergradient: " + "; ".join(explain(error, mark.model(value), value))) from error
    except ValueError as error:
        raise ConfigError(f"hypergradient: {error}") from error
    if not isinstance(built, Response):
        raise ConfigError(f"hypergradient: {value!r} is a {type(built).__name__}, which is no mlo.Response")
    return built
