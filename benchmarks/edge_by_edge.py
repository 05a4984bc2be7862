"""The supernet written edge by edge, as its definition has it: the reference that the fast one is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from problems.nas.operations import NONE, make_operation
from problems.nas.search_space import DARTS, ArchitectureLogits, CellKind, SearchSpace
from problems.nas.skeleton import CellInputs, CellPlan, CifarStem, edge_stride, plan_cells, total
from problems.nas.supernet import Supernet

Weights = tuple[Sequence[Sequence[Tensor]], Sequence[Tensor] | None]
"""A row of operations an edge, and the edges', where they have weights."""


class MixedEdge(nn.ModuleDict):
    """One edge: the sum of `operations` applied to a state, each times its weight (DARTS, equation 2).

    "none" contributes zero, so it is left out of the sum; its weight still takes its share of the softmax. Of K parts
    of the channels, the operations see the first, and the result is shuffled in K groups (PC-DARTS, section 3.1).
    """

    def __init__(self, operations: tuple[str, ...], channels: int, stride: int, partial: int) -> None:
        super().__init__(
            {name: make_operation(name, channels // partial, stride, False) for name in operations if name != NONE}
        )
        self.operations, self.stride, self.partial = operations, stride, partial

    def forward(self, features: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Mix the operations by `weights`, one scalar an operation."""
        rest = None
        if self.partial > 1:
            features, *others = features.chunk(self.partial, dim=1)
            rest = torch.cat(others, dim=1)
            rest = rest if self.stride == 1 else nn.functional.max_pool2d(rest, 2, 2, ceil_mode=True)
        pairs = zip(self.operations, weights, strict=True)
        mixed = total(weight * self[name](features) for name, weight in pairs if name != NONE)
        return mixed if rest is None else nn.functional.channel_shuffle(torch.cat([mixed, rest], dim=1), self.partial)


class MixedCell(nn.Module):
    """A cell in which each node is the sum of the mixed edges from all earlier states; the nodes are concatenated."""

    def __init__(self, space: SearchSpace, plan: CellPlan) -> None:
        super().__init__()
        self.kind: CellKind = "reduce" if plan.reduces else "normal"
        self.inputs = CellInputs(plan, affine=False)
        pairs = zip(space.edges, space.choices(self.kind), strict=True)
        self.edges = nn.ModuleList(
            MixedEdge(operations, plan.channels, edge_stride(plan, edge.source), space.partial)
            for edge, operations in pairs
        )
        self.rows = [
            [(row, edge.source) for row, edge in enumerate(space.edges) if edge.node == node]
            for node in range(space.nodes)
        ]

    def forward(self, before: Tensor, last: Tensor, weights: Weights) -> Tensor:
        """Map the outputs of the two cells before to this cell's, nodes x channels wide; `weights` one row an edge."""
        states: list[Tensor] = self.inputs(before, last)
        operations, edges = weights
        for incoming in self.rows:
            outputs = [self.edges[row](states[source], operations[row]) for row, source in incoming]
            if edges is not None:
                outputs = [edges[row] * output for (row, _), output in zip(incoming, outputs, strict=True)]
            states.append(total(outputs))
        return torch.cat(states[2:], dim=1)


class EdgeByEdge(nn.Module):
    """The same network as :class:`problems.nas.Supernet`, with CIFAR's stem and no dropout."""

    def __init__(
        self,
        space: SearchSpace = DARTS,
        channels: int = 16,
        cells: int = 8,
        classes: int = 10,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        self.space = space
        self.stem = CifarStem(image_channels, channels)
        plans = plan_cells(self.stem, channels, cells, space.nodes)
        self.cells = nn.ModuleList(MixedCell(space, plan) for plan in plans)
        self.classifier = nn.Linear(space.nodes * plans[-1].channels, classes)

    def forward(self, images: Tensor, weights: ArchitectureLogits) -> Tensor:
        """Return the class logits, (N, classes), under the architecture logits that `Architecture()` returns."""
        kinds: tuple[CellKind, CellKind] = ("normal", "reduce")
        mixtures = {kind: self._weights(kind, logits) for kind, logits in zip(kinds, weights, strict=True)}
        before, last = self.stem(images)
        for cell in self.cells:
            before, last = last, cell(before, last, mixtures[cell.kind])
        logits: Tensor = self.classifier(last.mean(dim=(2, 3)))
        return logits

    def _weights(self, kind: CellKind, logits: Tensor) -> Weights:
        """Take the matrix apart once, rather than by an indexing operation in each cell."""
        space, count = self.space, len(self.space.operations)
        if space.choices(kind) == (space.operations,) * len(space.edges):
            operations = [row.unbind() for row in logits[:, :count].softmax(dim=-1).unbind()]
        else:
            columns = [[space.operations.index(name) for name in names] for names in space.choices(kind)]
            operations = [row[kept].softmax(dim=0).unbind() for row, kept in zip(logits, columns, strict=True)]
        if not space.edge_weights:
            return operations, None
        nodes = [[row for row, edge in enumerate(space.edges) if edge.node == node] for node in range(space.nodes)]
        return operations, [weight for rows in nodes for weight in logits[rows, count].softmax(0).unbind()]


def load_edges(net: EdgeByEdge, supernet: Supernet) -> None:
    """Give the edge-by-edge network the weights and statistics of a supernet."""
    net.load_state_dict(net.state_dict() | supernet.edge_tensors())
