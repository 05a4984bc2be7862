"""Search spaces as data: which operations compete on which edges of a cell."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from problems.nas.operations import NONE, OPERATIONS, explain_unknown


class Edge(NamedTuple):
    """One edge of a cell: from state `source` (0 and 1 are the cell's inputs, 2 + i is node i) into node `node`."""

    source: int
    node: int


class ArchitectureLogits(NamedTuple):
    """An architecture in its continuous form: logits of the operations, (edges, operations) for each kind of cell."""

    normal: Tensor
    reduce: Tensor


@dataclass(frozen=True)
class SearchSpace:
    """A cell of `nodes` nodes, each of which may receive every earlier state through any of `operations`.

    Raises ValueError if there are no nodes, or if an operation is unknown or named twice.
    """

    operations: tuple[str, ...]
    nodes: int = 4

    def __post_init__(self) -> None:
        faults = [explain_unknown(name) for name in self.operations if name not in OPERATIONS]
        if len(set(self.operations)) < len(self.operations):
            faults.append(f"an operation is named twice in {self.operations}")
        if set(self.operations) <= {NONE}:
            faults.append(f"a space needs an operation other than {NONE!r}")
        if self.nodes < 1:
            faults.append(f"a cell needs at least 1 node, not {self.nodes}")
        if faults:
            raise ValueError("search space: " + "; ".join(faults))

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge of a cell, in the order of the logits' rows: by node, then by source."""
        return tuple(Edge(source, node) for node in range(self.nodes) for source in range(node + 2))

    def check(self, logits: ArchitectureLogits) -> None:
        """Raise ValueError unless the logits have one row an edge and one column an operation."""
        expected = (len(self.edges), len(self.operations))
        for kind, matrix in zip(logits._fields, logits, strict=True):
            if matrix.shape != expected:
                raise ValueError(
                    f"{kind} cell: the logits have shape {tuple(matrix.shape)}, but this space has {expected[0]} edges "
                    f"and {expected[1]} operations; take them from Architecture(space) of the same space"
                )


DARTS = SearchSpace(operations=OPERATIONS)
"""Liu, Simonyan and Yang 2019, DARTS: Differentiable Architecture Search, arXiv:1806.09055, section 3.1."""
