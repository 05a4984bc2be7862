"""Cell-based neural architecture search: search spaces, supernet, genotypes, evaluation network, diagnostics."""

from problems.nas.cell_drawing import draw_cell
from problems.nas.evaluation_network import EvaluationNetwork, Predictions
from problems.nas.genotype import Choice, Genotype, derive, random_genotype
from problems.nas.network_size import NetworkSize, size_of
from problems.nas.operations import BUILDABLE, NOISE, NONE, OPERATIONS
from problems.nas.published_genotypes import PUBLISHED
from problems.nas.search_diagnostics import (
    architecture_loss,
    count_operations,
    count_skips,
    dominant_eigenvalue,
    early_stop_epoch,
    entropy,
)
from problems.nas.search_space import (
    DARTS,
    P_DARTS,
    PC_DARTS,
    ROBUST_S4,
    ArchitectureLogits,
    CellKind,
    Edge,
    SearchSpace,
)
from problems.nas.skeleton import StemName
from problems.nas.supernet import Architecture, Supernet

__all__ = [
    "BUILDABLE",
    "DARTS",
    "NOISE",
    "NONE",
    "OPERATIONS",
    "PC_DARTS",
    "PUBLISHED",
    "P_DARTS",
    "ROBUST_S4",
    "Architecture",
    "ArchitectureLogits",
    "CellKind",
    "Choice",
    "Edge",
    "EvaluationNetwork",
    "Genotype",
    "NetworkSize",
    "Predictions",
    "SearchSpace",
    "StemName",
    "Supernet",
    "architecture_loss",
    "count_operations",
    "count_skips",
    "derive",
    "dominant_eigenvalue",
    "draw_cell",
    "early_stop_epoch",
    "entropy",
    "random_genotype",
    "size_of",
]
