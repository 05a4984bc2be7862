"""Hypergradients: a backward pass over the levels, made of estimators and curvature products."""

from __future__ import annotations

from pydantic import ValidationError

from mlo.errors import ConfigError
from mlo.hypergradient.backward import backward
from mlo.hypergradient.estimators.base import Estimator, Pulled, Recording
from mlo.hypergradient.estimators.implicit import ConjugateGradient, Implicit, Neumann, Nystrom
from mlo.hypergradient.estimators.one_step import Darts, FirstOrder, OneStep, Sama
from mlo.hypergradient.estimators.penalty import Penalty
from mlo.hypergradient.estimators.unrolled import AlongSteps, Truncated, Unrolled
from mlo.hypergradient.products import Central, Curvature, Exact, Forward, OneSided, Product, ProductOption
from mlo.options import registry
from mlo.options.config import Config, EstimatorOption, Registered, explain

__all__ = [
    "AlongSteps",
    "Central",
    "ConjugateGradient",
    "Curvature",
    "Darts",
    "Estimator",
    "Exact",
    "FirstOrder",
    "Forward",
    "Implicit",
    "Neumann",
    "Nystrom",
    "OneSided",
    "OneStep",
    "Penalty",
    "Product",
    "ProductOption",
    "Pulled",
    "Recording",
    "Sama",
    "Truncated",
    "Unrolled",
    "backward",
    "build_estimator",
    "name_of",
]


class _Options(Config):
    hypergradient: EstimatorOption


def build_estimator(value: object) -> Estimator:
    """The estimator given by a registered name, a mapping {"kind": name, **options}, or an :class:`Estimator`.

    Raises:
        ConfigError: if the name is not registered (the message lists those that are), or an option is invalid.
    """
    given = {"hypergradient": value}
    try:
        built = _Options.model_validate(given).hypergradient
    except ValidationError as error:
        raise ConfigError("; ".join(explain(error, _Options, given))) from error
    if not isinstance(built, Estimator):
        raise ConfigError(
            f"hypergradient: {value!r} is a {type(built).__name__}, not an mlo.Estimator; pass the name of one, a "
            "mapping {'kind': name, ...}, or an mlo.Estimator"
        )
    return built


def name_of(estimator: Estimator) -> str:
    """The name under which an estimator is registered, or that of its class."""
    kind = type(estimator)
    return (Registered(registry.ESTIMATORS).names(kind) or [kind.__name__])[0]
