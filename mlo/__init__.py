"""Multi-level optimization in PyTorch: problems that read each other's solutions, and their hypergradients."""

from mlo.errors import CheckpointError, ConfigError, GraphError, HypergradientError, MloError, NonFiniteLossError
from mlo.hypergradient import Estimator, Product
from mlo.levels.problem import Problem
from mlo.training.diagnostics import check, diagnose
from mlo.training.engine import Engine

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Engine",
    "Estimator",
    "GraphError",
    "HypergradientError",
    "MloError",
    "NonFiniteLossError",
    "Problem",
    "Product",
    "check",
    "diagnose",
]
