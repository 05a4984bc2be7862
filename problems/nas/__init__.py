"""Cell-based neural architecture search: search spaces, supernet, genotypes, evaluation network, diagnostics."""

from typing import TYPE_CHECKING

from mlo.lazy import lazy_names

if TYPE_CHECKING:  # the same names as in lazy_names below, for editors and type checkers
    from problems.nas.cell_drawing import draw_cell
    from problems.nas.evaluation_network import EvaluationNetwork, Predictions
    from problems.nas.genotype import Choice, Genotype, derive, random_genotype
    from problems.nas.network_size import NetworkSize, size_of
    from problems.nas.operation_names import BUILDABLE, NOISE, NONE, OPERATIONS
    from problems.nas.published_genotypes import PUBLISHED
    from problems.nas.search_diagnostics import (
        architecture_loss,
        count_operations,
        count_skips,
        dominant_eigenvalue,
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
    from problems.nas.skeleton import StemName, stem_for
    from problems.nas.supernet import Architecture, Supernet
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "problems.nas.cell_drawing": "draw_cell",
            "problems.nas.evaluation_network": "EvaluationNetwork Predictions",
            "problems.nas.genotype": "Choice Genotype derive random_genotype",
            "problems.nas.network_size": "NetworkSize size_of",
            "problems.nas.operation_names": "BUILDABLE NOISE NONE OPERATIONS",
            "problems.nas.published_genotypes": "PUBLISHED",
            "problems.nas.search_diagnostics": "architecture_loss count_operations count_skips "
            "dominant_eigenvalue entropy",
            "problems.nas.search_space": "DARTS P_DARTS PC_DARTS ROBUST_S4 ArchitectureLogits CellKind Edge "
            "SearchSpace",
            "problems.nas.skeleton": "StemName stem_for",
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
    "entropy",
    "random_genotype",
    "size_of",
    "stem_for",
]
