"""Multi-level optimization in PyTorch: problems that read each other's solutions, and their hypergradients."""

from mlo.diagnostics import check, diagnose
from mlo.engine import Engine
from mlo.errors import CheckpointError, ConfigError, GraphError, HypergradientError, MloError, NonFiniteLossError
from mlo.hypergradient import Product, Response
from mlo.problem import Problem

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Engine",
    "GraphError",
    "HypergradientError",
    "MloError",
    "NonFiniteLossError",
    "Problem",
    "Product",
    "Response",
    "check",
    "diagnose",
]
