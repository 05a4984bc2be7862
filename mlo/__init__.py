"""Multi-level optimization in PyTorch: problems that read each other's solutions, and their hypergradients."""

from mlo.engine import Engine
from mlo.errors import CheckpointError, ConfigError, GraphError, MloError, NonFiniteLossError
from mlo.hypergradient import Product, Response
from mlo.problem import Problem

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Engine",
    "GraphError",
    "MloError",
    "NonFiniteLossError",
    "Problem",
    "Product",
    "Response",
]
