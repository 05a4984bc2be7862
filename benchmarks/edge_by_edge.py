"""The supernet written edge by edge, as it is defined: the reference for the fast one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from problems.nas.operation_names import NONE
from problems.nas.operations import make_operation
from problems.nas.search_space import DARTS, ArchitectureLogits, CellKind, SearchSpace
from problems.nas.skeleton import CellInputs, CellPlan, CifarStem, edge_stride, plan_cells, total
from problems.nas.supernet import Supernet

Weights = tuple[Sequence[Sequence[Tensor]], Sequence[Tensor] | None]
"""The weights of the operations of each edge, and the weights of the edges if the space has them."""


class MixedEdge(nn.ModuleDict):
    """One edge: the weighted sum of `operations` applied to a state (DARTS, equation 2).

    "none" contributes zero, so it is left out of the sum, but its logit still counts in the softmax. With partial
    channels, operations see the first of K parts of the channels, and the result is shuffled in K groups (PC-DARTS,
    section 3.1).
    """

    def __init__(self, operations: tuple[str, ...], channels: int, stride: int, partial: int) -> None:
        super().__init__(
            {name: make_operation(name, channels // partial, stride, False) for name in operations if name != NONE}
        )
        self.operations, self.stride, self.partial = operations, stride, partial

    def forward(self, features: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Mix the operations by `weights`, one scalar for each."""
        rest = None
        if self.partial > 1:
            features, *others = features.chunk(self.partial, dim=1)
            rest = torch.cat(others, dim=1)
            rest = rest if self.stride == 1 else nn.functional.max_pool2d(rest, 2, 2, ceil_mode=True)
        pairs = zip(self.operations, weights, strict=True)
        mixed = total(weight * self[name](features) for name, weight in pairs if name != NONE)
        return mixed if rest is None else nn.functional.channel_shuffle(torch.cat([mixed, rest], dim=1), self.partial)


class MixedCell(nn.Module):
    """A cell in which each node sums the mixed edges from all earlier states; its output concatenates the nodes."""

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
        """Map the outputs of the two previous cells to this cell's output, nodes x channels wide."""
        states: list[Tensor] = self.inputs(before, last)
        operations, edges = weights
        for incoming in self.rows:
            outputs = [self.edges[row](states[source], operations[row]) for row, source in incoming]
            if edges is not None:
                outputs = [edges[row] * output for (row, _), output in zip(incoming, outputs, strict=True)]
            states.append(total(outputs))
        return torch.cat(states[2:], dim=1)


class EdgeByEdge(nn.Module):
    """The same network as :class:`problems.nas.Supernet`, with the CIFAR stem and without dropout."""

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
        """Map images and the logits of an `Architecture` to class logits, (N, classes)."""
        kinds: tuple[CellKind, CellKind] = ("normal", "reduce")
        mixtures = {kind: self._weights(kind, logits) for kind, logits in zip(kinds, weights, strict=True)}
        before, last = self.stem(images)
        for cell in self.cells:
            before, last = last, cell(before, last, mixtures[cell.kind])
        logits: Tensor = self.classifier(last.mean(dim=(2, 3)))
        return logits

    def _weights(self, kind: CellKind, logits: Tensor) -> Weights:
        """Compute the weights and split them into scalars once, instead of indexing in each cell."""
        space, count = self.space, len(self.space.operations)
        if space.choices(kind) == (space.operations,) * len(space.edges):
            operations = [row.unbind() for row in logits[:, :count].softmax(dim=-1).unbind()]
        else:
            columns = [[space.operations.index(name) for name in names] for names in space.choices(kind)]
            operations = [row[chosen].softmax(dim=0).unbind() for row, chosen in zip(logits, columns, strict=True)]
        if not space.edge_weights:
            return operations, None
        nodes = [[row for row, edge in enumerate(space.edges) if edge.node == node] for node in range(space.nodes)]
        return operations, [weight for rows in nodes for weight in logits[rows, count].softmax(0).unbind()]


def load_edges(net: EdgeByEdge, supernet: Supernet) -> None:
    """Copy the weights and running statistics of a supernet into the edge-by-edge network."""
    net.load_state_dict(net.state_dict() | supernet.edge_tensors())
