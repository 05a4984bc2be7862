"""Cell-based neural architecture search: spaces, supernet, genotypes, evaluation network, drawing, watching."""

from typing import TYPE_CHECKING

from mlo.lazy import lazy_names

if TYPE_CHECKING:  # the same names as in lazy_names below, for editors and type checkers
    from problems.nas.counting import Counts, count
    from problems.nas.drawing import draw_cell
    from problems.nas.genotype import Choice, Genotype, derive, random_genotype
    from problems.nas.network import EvaluationNetwork, Predictions
    from problems.nas.operation_names import BUILDABLE, NOISE, NONE, OPERATIONS
    from problems.nas.published import PUBLISHED
    from problems.nas.search_diagnostics import architecture_loss, dominant_eigenvalue, entropy, kept, skips, stop_at
    from problems.nas.skeleton import StemName, stem_for
    from problems.nas.space import DARTS, P_DARTS, PC_DARTS, ROBUST_S4, ArchitectureLogits, CellKind, Edge, SearchSpace
    from problems.nas.supernet import Architecture, Supernet
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "problems.nas.counting": "Counts count",
            "problems.nas.drawing": "draw_cell",
            "problems.nas.genotype": "Choice Genotype derive random_genotype",
            "problems.nas.network": "EvaluationNetwork Predictions",
            "problems.nas.operation_names": "BUILDABLE NOISE NONE OPERATIONS",
            "problems.nas.published": "PUBLISHED",
            "problems.nas.search_diagnostics": "architecture_loss dominant_eigenvalue entropy kept skips stop_at",
            "problems.nas.skeleton": "StemName stem_for",
            "problems.nas.space": "DARTS P_DARTS PC_DARTS ROBUST_S4 ArchitectureLogits CellKind Edge SearchSpace",
            "problems.nas.supernet": "Architecture Supernet",
        },
    )

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
    "stem_for",
    "stop_at",
]
