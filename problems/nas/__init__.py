"""Cell-based neural architecture search: spaces, supernet, genotypes, evaluation network, drawing, watching."""

from problems.nas.counting import Counts, count
from problems.nas.drawing import draw_cell
from problems.nas.genotype import Choice, Genotype, derive, random_genotype
from problems.nas.network import EvaluationNetwork, Predictions
from problems.nas.operations import BUILDABLE, NOISE, NONE, OPERATIONS
from problems.nas.published import PUBLISHED
from problems.nas.search_diagnostics import architecture_loss, dominant_eigenvalue, entropy, kept, skips, stop_at
from problems.nas.skeleton import StemName
from problems.nas.space import DARTS, P_DARTS, PC_DARTS, ROBUST_S4, ArchitectureLogits, CellKind, Edge, SearchSpace
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
    "Counts",
    "Edge",
    "EvaluationNetwork",
    "Genotype",
    "Predictions",
    "SearchSpace",
    "StemName",
    "Supernet",
    "architecture_loss",
    "count",
    "derive",
    "dominant_eigenvalue",
    "draw_cell",
    "entropy",
    "kept",
    "random_genotype",
    "skips",
    "stop_at",
]
