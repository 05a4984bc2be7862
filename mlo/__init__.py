"""Multi-level optimization in PyTorch: problems that read each other's solutions, and their hypergradients."""

from typing import TYPE_CHECKING

from mlo.lazy import lazy_names

if TYPE_CHECKING:  # the same names as in lazy_names below, for editors and type checkers
    from mlo.errors import (
        CheckpointError,
        ConfigError,
        GraphError,
        HypergradientError,
        InconclusiveError,
        MloError,
        NonFiniteLossError,
        ProcessError,
    )
    from mlo.hypergradient.estimators.base import Estimator, Pulled, Recording
    from mlo.hypergradient.products import Product, ProductOption
    from mlo.levels.problem import Problem
    from mlo.ops import distributed
    from mlo.options.config import Config, EstimatorOption
    from mlo.runs.job import Job
    from mlo.runs.run import Run
    from mlo.sweeps.experiment import Experiment, Wanted
    from mlo.training import checkpoint
    from mlo.training.check import check
    from mlo.training.diagnostics import diagnose
    from mlo.training.engine import Engine
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "mlo.errors": "CheckpointError ConfigError GraphError HypergradientError InconclusiveError "
            "MloError NonFiniteLossError ProcessError",
            "mlo.hypergradient.estimators.base": "Estimator Pulled Recording",
            "mlo.hypergradient.products": "Product ProductOption",
            "mlo.levels.problem": "Problem",
            "mlo.ops": "distributed",
            "mlo.options.config": "Config EstimatorOption",
            "mlo.runs.job": "Job",
            "mlo.runs.run": "Run",
            "mlo.sweeps.experiment": "Experiment Wanted",
            "mlo.training": "checkpoint",
            "mlo.training.check": "check",
            "mlo.training.diagnostics": "diagnose",
            "mlo.training.engine": "Engine",
        },
    )

__all__ = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "Engine",
    "Estimator",
    "EstimatorOption",
    "Experiment",
    "GraphError",
    "HypergradientError",
    "InconclusiveError",
    "Job",
    "MloError",
    "NonFiniteLossError",
    "Problem",
    "ProcessError",
    "Product",
    "ProductOption",
    "Pulled",
    "Recording",
    "Run",
    "Wanted",
    "check",
    "checkpoint",
    "diagnose",
    "distributed",
]
