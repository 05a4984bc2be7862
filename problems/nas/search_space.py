"""Search spaces as data: which operations compete on which edges of a cell, and how logits weight them."""

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
    """One edge of a cell: from state `source` (0 and 1 are the cell's inputs, 2 + i is node i) to node `node`."""

    source: int
    node: int


class ArchitectureLogits(NamedTuple):
    """The continuous architecture: one matrix for each kind of cell, with edges as rows and operations as columns.

    In a space with edge weights, one more column holds the logits of the edges.
    """

    normal: Tensor
    reduce: Tensor


class Mixture(NamedTuple):
    """The weights computed from logits: of operations, (edges, operations); of edges, (edges,), or None without them.

    The weights of operations already include the weight of their edge as a factor.
    """

    operations: Tensor
    edges: Tensor | None


@dataclass(frozen=True)
class SearchSpace:
    """A cell of `nodes` nodes; an edge with any of `operations` may lead from every earlier state to each node.

    Args:
        operations: the names of the operations, in the order of the logits' columns.
        nodes: the number of nodes of a cell.
        partial: K of partial channel connections (PC-DARTS): operations see the first of K equal parts of the channels,
            and the other parts bypass them. 1 means all channels.
        edge_weights: whether edges have weights as well, a softmax over the edges into each node (PC-DARTS).
        normal, reduce: the operations of each edge, if edges do not all have the same ones (P-DARTS).
        max_skips: the largest number of skip-connections in a derived normal cell (P-DARTS).

    Raises:
        ValueError: lists all errors: invalid names or counts, and edges without an operation.
    """

    operations: tuple[str, ...]
    nodes: int = 4
    partial: int = 1
    edge_weights: bool = False
    normal: Choices | None = None
    reduce: Choices | None = None
    max_skips: int | None = None

    def __post_init__(self) -> None:
        errors = [explain_unknown(name) for name in self.operations if name not in (NONE, *BUILDABLE)]
        if len(set(self.operations)) < len(self.operations):
            errors.append(f"an operation is named twice in {self.operations}; name each one once")
        if set(self.operations) <= {NONE}:
            errors.append(f"a space needs an operation other than {NONE!r}")
        if self.nodes < 1:
            errors.append(f"a cell needs at least 1 node, not {self.nodes}")
        if self.partial < 1:
            errors.append(f"partial must be at least 1, not {self.partial}")
        if self.max_skips is not None and self.max_skips < 0:
            errors.append(f"max_skips must be at least 0, not {self.max_skips}")
        if not errors:
            errors = [*self._choice_errors("normal"), *self._choice_errors("reduce")]
        if errors:
            raise ValueError("search space: " + "; ".join(errors))

    def _choice_errors(self, kind: CellKind) -> Iterator[str]:
        choices = self.choices(kind)
        if len(choices) != len(self.edges):
            yield f"{kind} lists operations for {len(choices)} edges, but the cell has {len(self.edges)}"
        for row, names in enumerate(choices):
            unknown = [name for name in names if name not in self.operations]
            if unknown:
                yield f"{kind}, edge {row}: {', '.join(unknown)} not in the operations of the space"
            if set(names) <= {NONE}:
                yield f"{kind}, edge {row}: needs an operation other than {NONE!r}"

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """All edges of a cell, in the order of the logits' rows: by node, then by source."""
        return tuple(Edge(source, node) for node in range(self.nodes) for source in range(node + 2))

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the logits of one kind of cell: (edges, operations), or (edges, operations + 1)."""
        return len(self.edges), len(self.operations) + self.edge_weights

    def choices(self, kind: CellKind) -> Choices:
        """Return the operations of each edge. Raises ValueError if `kind` is neither "normal" nor "reduce"."""
        if kind not in ("normal", "reduce"):
            raise ValueError(f"{kind!r} is not a kind of cell; valid: normal, reduce")
        return (self.normal if kind == "normal" else self.reduce) or (self.operations,) * len(self.edges)

    def check(self, logits: ArchitectureLogits) -> None:
        """Raise ValueError unless both matrices of the logits have the shape `shape`."""
        if not isinstance(logits, ArchitectureLogits):
            raise ValueError(
                f"expected ArchitectureLogits, not {type(logits).__name__}; call the Architecture module to get them: "
                "architecture()"
            )
        for kind, matrix in zip(logits._fields, logits, strict=True):
            if matrix.shape != self.shape:
                columns = f"{len(self.operations)} operations" + (" and edge weights" if self.edge_weights else "")
                raise ValueError(
                    f"{kind} cell: the logits have shape {tuple(matrix.shape)}, but this space has {len(self.edges)} "
                    f"edges and {columns}; use Architecture(space) with the same space"
                )

    def operation_logits(self, kind: CellKind, logits: Tensor) -> Tensor:
        """The logits of the operations, (edges, operations): minus infinity for those that an edge does not have."""
        operations = logits[:, :-1] if self.edge_weights else logits
        dropped = [[name not in names for name in self.operations] for names in self.choices(kind)]
        if not any(map(any, dropped)):
            return operations
        import torch

        return operations.masked_fill(torch.tensor(dropped, device=logits.device), float("-inf"))

    def mixture(self, kind: CellKind, logits: Tensor) -> Mixture:
        """Compute weights from logits: a softmax over the operations of each edge, zero for those it does not have.

        In a space with edge weights, a softmax over the edges into each node gives the weight of each edge, which
        multiplies the weights of its operations (Xu et al. 2020, PC-DARTS, equation 4).
        """
        weights = self.operation_logits(kind, logits).softmax(dim=-1)
        if not self.edge_weights:
            return Mixture(weights, None)
        import torch

        incoming = logits[:, -1].split([node + 2 for node in range(self.nodes)])
        edges = torch.cat([part.softmax(dim=0) for part in incoming])
        return Mixture(weights * edges[:, None], edges)

    def narrow(self, logits: ArchitectureLogits, drop: int) -> SearchSpace:
        """Return the space without the `drop` weakest operations of each edge, as P-DARTS does between stages.

        The weakest are those with the smallest softmax weight; ties drop the operation that comes first in the space.
        If only one operation remains, it is not "none". The logits keep their columns, so an `Architecture` of the
        narrower space has the same shape.

        Raises:
            ValueError: if an edge would have no operation left, or the logits do not have the shape of the space.
        """
        self.check(logits)
        normal, reduce = self._narrow("normal", logits.normal, drop), self._narrow("reduce", logits.reduce, drop)
        return replace(self, normal=normal, reduce=reduce)

    def _narrow(self, kind: CellKind, logits: Tensor, drop: int) -> Choices:
        weights = self.mixture(kind, logits.detach().cpu().double()).operations.tolist()
        remaining = []
        for row, names in zip(weights, self.choices(kind), strict=True):
            if not 0 <= drop < len(names):
                raise ValueError(
                    f"cannot drop {drop} operations from an edge that has {len(names)} ({', '.join(names)}); "
                    f"drop at most {len(names) - 1}"
                )
            drop_none_first = len(names) - drop == 1
            rank = {name: (name != NONE or not drop_none_first, row[self.operations.index(name)]) for name in names}
            left = sorted(names, key=rank.__getitem__)[drop:]
            remaining.append(tuple(name for name in self.operations if name in left))
        return tuple(remaining)


DARTS = SearchSpace(operations=OPERATIONS)
"""Liu, Simonyan and Yang 2019, DARTS: Differentiable Architecture Search, arXiv:1806.09055, section 3.1."""

PC_DARTS = SearchSpace(operations=OPERATIONS, partial=4, edge_weights=True)
"""Xu et al. 2020, PC-DARTS: Partial Channel Connections, arXiv:1907.05737, section 3; partial=2 for ImageNet."""

P_DARTS = SearchSpace(operations=OPERATIONS, max_skips=2)
"""Chen et al. 2019, Progressive DARTS, arXiv:1904.12760: the first of its three stages; `narrow` gives the others."""

ROBUST_S4 = SearchSpace(operations=("sep_conv_3x3", NOISE))
"""Zela et al. 2020, RobustDARTS, arXiv:1909.09656, section 3, space S4: a convolution, and noise, which is useless."""
