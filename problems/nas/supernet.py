"""The supernet of a cell-based search space, in which every edge is a weighted mixture of all its operations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from problems.nas.fan import Fan
from problems.nas.skeleton import CellInputs, CellPlan, CifarStem, edge_stride, plan_cells, total
from problems.nas.space import DARTS, ArchitectureLogits, SearchSpace


class Architecture(nn.Module):
    """The continuous architecture: one logit an edge and operation, for normal and for reduction cells.

    Both parameters have shape (edges, operations), 14 x 8 in the DARTS space, and start at 1e-3 N(0, 1).
    """

    def __init__(self, space: SearchSpace = DARTS) -> None:
        super().__init__()
        shape = (len(space.edges), len(space.operations))
        self.normal = nn.Parameter(1e-3 * torch.randn(shape))
        self.reduce = nn.Parameter(1e-3 * torch.randn(shape))

    def forward(self) -> ArchitectureLogits:
        """Return the logits themselves; the softmax over operations is the supernet's."""
        return ArchitectureLogits(self.normal, self.reduce)


class MixedCell(nn.Module):
    """A cell in which each node is the sum of the mixed edges from all earlier states; the nodes are concatenated.

    All edges that leave one state are computed together, by a :class:`Fan`; none leave the last node.
    """

    def __init__(self, space: SearchSpace, plan: CellPlan) -> None:
        super().__init__()
        self.reduces = plan.reduces
        self.inputs = CellInputs(plan, affine=False)
        self.fans = nn.ModuleList()
        self.targets: list[list[int]] = []
        for source in range(space.nodes + 1):
            nodes = {row: edge.node for row, edge in enumerate(space.edges) if edge.source == source}
            edges = dict.fromkeys(nodes, space.operations)
            self.fans.append(Fan(edges, space.operations, plan.channels, edge_stride(plan, source)))
            self.targets.append([*nodes.values()])

    def forward(self, before: Tensor, last: Tensor, weights: Tensor) -> Tensor:
        """Map the outputs of the two cells before to this cell's, nodes x channels wide; `weights` one row an edge."""
        states: list[Tensor] = self.inputs(before, last)
        terms: list[list[Tensor]] = [[] for _ in self.fans[1:]]
        for source, (fan, targets) in enumerate(zip(self.fans, self.targets, strict=True)):
            if source >= 2:
                states.append(total(terms[source - 2]).permute(0, 3, 1, 2))
            for node, output in zip(targets, fan(states[source], weights), strict=True):
                terms[node] += output
        states.append(total(terms[-1]).permute(0, 3, 1, 2))
        return torch.cat(states[2:], dim=1)

    def edge_tensors(self) -> list[tuple[int, str, str, Tensor]]:
        """List (edge, operation, name, view) of the fans' weights and statistics, edge after edge."""
        fans = (fan for fan in self.fans if isinstance(fan, Fan))
        return sorted((entry for fan in fans for entry in fan.edge_tensors()), key=lambda entry: entry[0])


class Supernet(nn.Module):
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
        normal, reduce = (logits.softmax(dim=-1) for logits in weights)
        before, last = self.stem(images.contiguous(memory_format=torch.channels_last))
        for cell in self.cells:
            before, last = last, cell(before, last, reduce if cell.reduces else normal)
        logits: Tensor = self.classifier(last.mean(dim=(2, 3)))
        return logits

    def edge_tensors(self) -> dict[str, Tensor]:
        """Return all weights and running statistics edge by edge, as views: to write into one is to load it.

        That of cell 2, edge 3 is "cells.2.edges.3.sep_conv_3x3.1.weight": the row of the edge in `space.edges`, its
        operation, and the name that the tensor has in that operation's module, `make_operation(..., affine=False)`.
        Edges that share a pool share its running statistics. All else is named as in `state_dict()`.
        """
        tensors = {name: value for name, value in self.state_dict().items() if ".fans." not in name}
        for index, cell in enumerate(self.cells):
            assert isinstance(cell, MixedCell)
            for edge, operation, name, view in cell.edge_tensors():
                tensors[f"cells.{index}.edges.{edge}.{operation}.{name}"] = view
        return tensors
