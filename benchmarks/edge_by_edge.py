"""The supernet written edge by edge, as its definition has it: the reference that the fast one is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from problems.nas.operations import NONE, make_operation
from problems.nas.skeleton import CellInputs, CellPlan, CifarStem, edge_stride, plan_cells, total
from problems.nas.space import DARTS, ArchitectureLogits, SearchSpace
from problems.nas.supernet import Supernet


class MixedEdge(nn.ModuleDict):
    """One edge: the sum of `operations` applied to a state, each times its weight (DARTS, equation 2).

    "none" contributes zero, so it is left out of the sum; its weight still takes its share of the softmax.
    """

    def __init__(self, operations: tuple[str, ...], channels: int, stride: int) -> None:
        super().__init__(
            {name: make_operation(name, channels, stride, affine=False) for name in operations if name != NONE}
        )
        self.operations = operations

    def forward(self, features: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Mix the operations by `weights`, one scalar an operation."""
        pairs = zip(self.operations, weights, strict=True)
        return total(weight * self[name](features) for name, weight in pairs if name != NONE)


class MixedCell(nn.Module):
    """A cell in which each node is the sum of the mixed edges from all earlier states; the nodes are concatenated."""

    def __init__(self, space: SearchSpace, plan: CellPlan) -> None:
        super().__init__()
        self.reduces = plan.reduces
        self.inputs = CellInputs(plan, affine=False)
        self.edges = nn.ModuleList(
            MixedEdge(space.operations, plan.channels, edge_stride(plan, edge.source)) for edge in space.edges
        )
        self.rows = [
            [(row, edge.source) for row, edge in enumerate(space.edges) if edge.node == node]
            for node in range(space.nodes)
        ]

    def forward(self, before: Tensor, last: Tensor, weights: Sequence[Sequence[Tensor]]) -> Tensor:
        """Map the outputs of the two cells before to this cell's, nodes x channels wide; `weights` one row an edge."""
        states: list[Tensor] = self.inputs(before, last)
        for incoming in self.rows:
            states.append(total(self.edges[row](states[source], weights[row]) for row, source in incoming))
        return torch.cat(states[2:], dim=1)


class EdgeByEdge(nn.Module):
    """All architectures of a space in one network, mixed by the weights it is called with.

    `channels` are those of the first cell; they double at the two reduction cells, a third and two thirds into
    `cells`. The stem is that of CIFAR. Images (N, image_channels, H, W) may be of any size that survives two
    halvings. Architecture parameters are an input, not a part, so `parameters()` are the weights alone.

    Raises ValueError for fewer than one cell.
    """

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
        """Return the class logits, (N, classes), under the architecture logits that `Architecture()` returns.

        Raises ValueError if the shape of the architecture logits is not that of the space.
        """
        self.space.check(weights)
        normal, reduce = (_scalars(logits.softmax(dim=-1)) for logits in weights)
        before, last = self.stem(images)
        for cell in self.cells:
            before, last = last, cell(before, last, reduce if cell.reduces else normal)
        logits: Tensor = self.classifier(last.mean(dim=(2, 3)))
        return logits


def _scalars(matrix: Tensor) -> list[tuple[Tensor, ...]]:
    """Take a matrix apart once, rather than by an indexing operation in each cell."""
    return [row.unbind() for row in matrix.unbind()]


def load_edges(net: EdgeByEdge, supernet: Supernet) -> None:
    """Give the edge-by-edge network the weights and statistics of a supernet."""
    net.load_state_dict(net.state_dict() | supernet.edge_tensors())
