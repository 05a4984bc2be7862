"""Search spaces as data: which operations compete on which edges of a cell, and how they are weighted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

from problems.nas.operation_names import BUILDABLE, NOISE, NONE, OPERATIONS, explain_unknown

if TYPE_CHECKING:  # options are checked against a space, without loading torch
    from torch import Tensor

CellKind = Literal["normal", "reduce"]
Choices = tuple[tuple[str, ...], ...]


class Edge(NamedTuple):
    """One edge of a cell: from state `source` (0 and 1 are the cell's inputs, 2 + i is node i) into node `node`."""

    source: int
    node: int


class ArchitectureLogits(NamedTuple):
    """An architecture in its continuous form, for each kind of cell: one row an edge, one column an operation.

    In a space that weighs edges, one more column: the logits of the edges themselves.
    """

    normal: Tensor
    reduce: Tensor


class Mixture(NamedTuple):
    """The weights that logits stand for: of operations, (edges, operations), and of edges, (edges), where there are.

    The weight of an edge is already a factor in those of its operations.
    """

    operations: Tensor
    edges: Tensor | None


@dataclass(frozen=True)
class SearchSpace:
    """A cell of `nodes` nodes, each of which may receive every earlier state through any of `operations`.

    Args:
        operations: their names, in the order of the logits' columns.
        nodes: of a cell.
        partial: K; operations see the first of K equal parts of the channels, the others bypass them (PC-DARTS).
        edge_weights: whether edges have weights too, a softmax over those that enter a node (PC-DARTS).
        normal, reduce: the operations of each edge, where not all edges have all (P-DARTS).
        max_skips: how many skip-connections a derived normal cell may have (P-DARTS).

    Raises ValueError, which tells all faults: of names, of counts, of edges without an operation.
    """

    operations: tuple[str, ...]
    nodes: int = 4
    partial: int = 1
    edge_weights: bool = False
    normal: Choices | None = None
    reduce: Choices | None = None
    max_skips: int | None = None

    def __post_init__(self) -> None:
        faults = [explain_unknown(name) for name in self.operations if name not in (NONE, *BUILDABLE)]
        if len(set(self.operations)) < len(self.operations):
            faults.append(f"an operation is named twice in {self.operations}")
        if set(self.operations) <= {NONE}:
            faults.append(f"a space needs an operation other than {NONE!r}")
        if self.nodes < 1:
            faults.append(f"a cell needs at least 1 node, not {self.nodes}")
        if self.partial < 1:
            faults.append(f"partial must be at least 1, not {self.partial}")
        if self.max_skips is not None and self.max_skips < 0:
            faults.append(f"max_skips must be at least 0, not {self.max_skips}")
        if not faults:
            faults = [*self._choice_faults("normal"), *self._choice_faults("reduce")]
        if faults:
            raise ValueError("search space: " + "; ".join(faults))

    def _choice_faults(self, kind: CellKind) -> Iterator[str]:
        choices = self.choices(kind)
        if len(choices) != len(self.edges):
            yield f"{kind} has operations for {len(choices)} edges, but the cell has {len(self.edges)}"
        for row, names in enumerate(choices):
            unknown = [name for name in names if name not in self.operations]
            if unknown:
                yield f"{kind}, edge {row}: {', '.join(unknown)} not among the operations of the space"
            if set(names) <= {NONE}:
                yield f"{kind}, edge {row}: needs an operation other than {NONE!r}"

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge of a cell, in the order of the logits' rows: by node, then by source."""
        return tuple(Edge(source, node) for node in range(self.nodes) for source in range(node + 2))

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the logits of one kind of cell: (edges, operations), or (edges, operations + 1)."""
        return len(self.edges), len(self.operations) + self.edge_weights

    def choices(self, kind: CellKind) -> Choices:
        """Return the operations of each edge. Raises ValueError for another kind than "normal" and "reduce"."""
        if kind not in ("normal", "reduce"):
            raise ValueError(f"{kind!r} is not a kind of cell; valid: normal, reduce")
        return (self.normal if kind == "normal" else self.reduce) or (self.operations,) * len(self.edges)

    def check(self, logits: ArchitectureLogits) -> None:
        """Raise ValueError unless the logits have one row an edge and one column an operation (see `shape`)."""
        if not isinstance(logits, ArchitectureLogits):
            raise ValueError(f"{type(logits).__name__} is no ArchitectureLogits; call the Architecture: architecture()")
        for kind, matrix in zip(logits._fields, logits, strict=True):
            if matrix.shape != self.shape:
                columns = f"{len(self.operations)} operations" + (" and edge weights" if self.edge_weights else "")
                raise ValueError(
                    f"{kind} cell: the logits have shape {tuple(matrix.shape)}, but this space has {len(self.edges)} "
                    f"edges and {columns}; take them from Architecture(space) of the same space"
                )

    def operation_logits(self, kind: CellKind, logits: Tensor) -> Tensor:
        """The logits of the operations alone, (edges, operations), minus infinity for those that an edge has not."""
        operations = logits[:, :-1] if self.edge_weights else logits
        dropped = [[name not in names for name in self.operations] for names in self.choices(kind)]
        if not any(map(any, dropped)):
            return operations
        import torch

        return operations.masked_fill(torch.tensor(dropped, device=logits.device), float("-inf"))

    def mixture(self, kind: CellKind, logits: Tensor) -> Mixture:
        """Turn logits into weights: a softmax over the operations of each edge, zero for those that it has not.

        Where edges have weights, those are a softmax over the edges into each node, and multiply their operations'
        (Xu et al. 2020, PC-DARTS, equation 4).
        """
        weights = self.operation_logits(kind, logits).softmax(dim=-1)
        if not self.edge_weights:
            return Mixture(weights, None)
        import torch

        incoming = logits[:, -1].split([node + 2 for node in range(self.nodes)])
        edges = torch.cat([part.softmax(dim=0) for part in incoming])
        return Mixture(weights * edges[:, None], edges)

    def narrow(self, logits: ArchitectureLogits, drop: int) -> SearchSpace:
        """Drop the `drop` operations of least softmax weight on each edge, as P-DARTS does between its stages.

        Of equal weights the first goes first. If one operation is left, it is not "none". The logits keep their
        columns, so a new `Architecture` of the narrower space has the same shape. Raises ValueError if nothing
        would be left on an edge, or if the logits are not the space's.
        """
        self.check(logits)
        normal, reduce = self._narrow("normal", logits.normal, drop), self._narrow("reduce", logits.reduce, drop)
        return replace(self, normal=normal, reduce=reduce)

    def _narrow(self, kind: CellKind, logits: Tensor, drop: int) -> Choices:
        weights = self.mixture(kind, logits.detach().cpu().double()).operations.tolist()
        kept = []
        for row, names in zip(weights, self.choices(kind), strict=True):
            if not 0 <= drop < len(names):
                raise ValueError(f"cannot drop {drop} operations of an edge that has {len(names)}: {', '.join(names)}")
            none_goes_first = len(names) - drop == 1
            rank = {name: (name != NONE or not none_goes_first, row[self.operations.index(name)]) for name in names}
            left = sorted(names, key=rank.__getitem__)[drop:]
            kept.append(tuple(name for name in self.operations if name in left))
        return tuple(kept)


DARTS = SearchSpace(operations=OPERATIONS)
"""Liu, Simonyan and Yang 2019, DARTS: Differentiable Architecture Search, arXiv:1806.09055, section 3.1."""

PC_DARTS = SearchSpace(operations=OPERATIONS, partial=4, edge_weights=True)
"""Xu et al. 2020, PC-DARTS: Partial Channel Connections, arXiv:1907.05737, section 3; partial=2 for ImageNet."""

P_DARTS = SearchSpace(operations=OPERATIONS, max_skips=2)
"""Chen et al. 2019, Progressive DARTS, arXiv:1904.12760: the first of three stages; `narrow` gives the others."""

ROBUST_S4 = SearchSpace(operations=("sep_conv_3x3", NOISE))
"""Zela et al. 2020, RobustDARTS, arXiv:1909.09656, section 3, space S4: one good operation, and one known to be bad."""
