"""The supernet of a cell-based search space, in which every edge is a weighted mixture of all its operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from problems.nas.cell_edges import GroupedEdges
from problems.nas.grouped_convolutions import pixels_of
from problems.nas.search_space import DARTS, ArchitectureLogits, CellKind, Mixture, SearchSpace
from problems.nas.skeleton import CellInputs, CellPlan, Stem, StemName, edge_stride, make_stem, plan_cells, total


class Architecture(nn.Module):
    """The architecture weights (alpha): one logit for each edge and operation, for normal and for reduction cells.

    Both parameters have the shape `space.shape`, 14 x 8 in the DARTS space, and are initialized from 1e-3 N(0, 1). In
    a space with edge weights, the last column holds the logits of the edges.
    """

    def __init__(self, space: SearchSpace = DARTS) -> None:
        super().__init__()
        self.normal = nn.Parameter(1e-3 * torch.randn(space.shape))
        self.reduce = nn.Parameter(1e-3 * torch.randn(space.shape))

    def forward(self) -> ArchitectureLogits:
        """Return the logits; the supernet applies the softmax over operations."""
        return ArchitectureLogits(self.normal, self.reduce)


class MixedCell(nn.Module):
    """A cell in which each node sums the mixed edges from all earlier states; its output concatenates the nodes.

    All edges that leave one state are computed together, by :class:`GroupedEdges`; no edge leaves the last node.

    With partial channels (PC-DARTS, `space.partial` = K), only the first of K parts of a state's channels goes through
    the edges; the rest bypasses them. Each node then shuffles its channels in K groups.
    """

    def __init__(self, space: SearchSpace, plan: CellPlan) -> None:
        super().__init__()
        self.partial, self.mixed_channels = space.partial, plan.channels // space.partial
        self.kind: CellKind = "reduce" if plan.reduces else "normal"
        self.inputs = CellInputs(plan, affine=False)
        self.edge_groups = nn.ModuleList()
        self.targets: list[list[int]] = []
        for source in range(space.nodes + 1):
            nodes = {row: edge.node for row, edge in enumerate(space.edges) if edge.source == source}
            edges = {row: space.choices(self.kind)[row] for row in nodes}
            stride = edge_stride(plan, source)
            self.edge_groups.append(GroupedEdges(edges, space.operations, self.mixed_channels, stride))
            self.targets.append([*nodes.values()])

    def forward(self, before: Tensor, last: Tensor, weights: Mixture, skip_dropout: float) -> Tensor:
        """Map the outputs of the two previous cells to this cell's output, nodes x channels wide."""
        states: list[Tensor] = self.inputs(before, last)
        mixed: list[list[Tensor]] = [[] for _ in self.edge_groups[1:]]
        bypassed: list[list[Tensor]] = [[] for _ in mixed]
        for source, (group, targets) in enumerate(zip(self.edge_groups, self.targets, strict=True)):
            assert isinstance(group, GroupedEdges)
            if source >= 2:
                states.append(self._node(mixed[source - 2], bypassed[source - 2]))
            state = states[source]
            if self.partial > 1:
                state, rest = state.split([self.mixed_channels, state.shape[1] - self.mixed_channels], dim=1)
                for node, term in zip(targets, self._bypass(group, rest, weights.edges), strict=True):
                    bypassed[node].append(term)
            for node, terms in zip(targets, group(state, weights.operations, skip_dropout), strict=True):
                mixed[node] += terms
        states.append(self._node(mixed[-1], bypassed[-1]))
        return torch.cat(states[2:], dim=1)

    def _bypass(self, group: GroupedEdges, rest: Tensor, weights: Tensor | None) -> list[Tensor]:
        """Return, for each edge, the channels that bypass its operations, (N, H', W', channels), times its weight."""
        pixels = pixels_of(rest if group.stride == 1 else F.max_pool2d(rest, 2, 2, ceil_mode=True))
        return [pixels if weights is None else pixels * weights[edge] for edge in group.edges]

    def _node(self, mixed: list[Tensor], bypassed: list[Tensor]) -> Tensor:
        """Sum the terms of a node, each (N, H, W, channels), to (N, channels, H, W); shuffle partial channels."""
        pixels = total(mixed)
        if bypassed:
            groups = torch.cat([pixels, total(bypassed)], dim=-1).unflatten(-1, (self.partial, self.mixed_channels))
            pixels = groups.transpose(-1, -2).flatten(-2)
        return pixels.permute(0, 3, 1, 2)

    def edge_tensors(self) -> list[tuple[int, str, str, Tensor]]:
        """List (edge, operation, name, view) for all weights and running statistics, sorted by edge."""
        groups = (group for group in self.edge_groups if isinstance(group, GroupedEdges))
        return sorted((entry for group in groups for entry in group.edge_tensors()), key=lambda entry: entry[0])


class Supernet(nn.Module):
    """All architectures of a space in one network; the architecture logits mix them (Liu et al. 2019, section 2.2).

    The architecture is an input of `forward` and not part of the module, so `parameters()` are the network weights
    alone.

    Args:
        space: the search space.
        channels: of the first cell; they double at the two reduction cells, a third and two thirds of the way through.
        cells: the number of cells.
        classes: the number of classes.
        image_channels: the number of channels of the images. Their height and width must allow two halvings, and
            three more with the ImageNet stem.
        stem: "cifar" or "imagenet".

    Attributes:
        skip_dropout: the probability of dropout after skip-connections of stride 1 in training, in [0, 1). It may be
            changed at any time (Chen et al. 2019, P-DARTS, section 3.3).
        memory_format: the order of images and features in memory. On a CPU channels-last is faster. The section "Memory
            format" of docs/gpu.md says how to choose on a GPU.

    Raises:
        ValueError: for fewer than one cell, an unknown stem, or channels not divisible by `space.partial`.
    """

    memory_format: torch.memory_format = torch.channels_last

    def __init__(
        self,
        space: SearchSpace = DARTS,
        channels: int = 16,
        cells: int = 8,
        classes: int = 10,
        image_channels: int = 3,
        stem: StemName = "cifar",
    ) -> None:
        super().__init__()
        if channels % space.partial:
            raise ValueError(
                f"{channels} channels cannot be split into the {space.partial} equal parts of this space (partial="
                f"{space.partial}); use a multiple of {space.partial}"
            )
        self.space = space
        self.skip_dropout = 0.0
        # The stem has 3 times the channels of the first cell. CIFAR's always has; ImageNet's only in search, as in the
        # code of PC-DARTS.
        self.stem: Stem = make_stem(stem, image_channels, channels if stem == "cifar" else 3 * channels)
        plans = plan_cells(self.stem, channels, cells, space.nodes)
        self.cells = nn.ModuleList(MixedCell(space, plan) for plan in plans)
        self.classifier = nn.Linear(space.nodes * plans[-1].channels, classes)

    def forward(self, images: Tensor, weights: ArchitectureLogits) -> Tensor:
        """Return class logits of shape (N, classes).

        Args:
            images: (N, image_channels, H, W).
            weights: the architecture logits, as an :class:`Architecture` returns them.

        Raises:
            ValueError: if the logits do not have the shape of the space, or `skip_dropout` is not in [0, 1).
        """
        self.space.check(weights)
        if not 0 <= self.skip_dropout < 1:
            raise ValueError(f"skip_dropout must be in [0, 1), not {self.skip_dropout}")
        mixtures = {
            "normal": self.space.mixture("normal", weights.normal),
            "reduce": self.space.mixture("reduce", weights.reduce),
        }
        before, last = self.stem(images.contiguous(memory_format=self.memory_format))
        for cell in self.cells:
            assert isinstance(cell, MixedCell)
            before, last = last, cell(before, last, mixtures[cell.kind], self.skip_dropout)
        logits: Tensor = self.classifier(last.mean(dim=(2, 3)))
        return logits

    def edge_tensors(self) -> dict[str, Tensor]:
        """Return all weights and running statistics edge by edge, as views: writing into a view changes the supernet.

        A name like "cells.2.edges.3.sep_conv_3x3.1.weight" gives the cell, the row of the edge in `space.edges`, the
        operation, and the name of the tensor in the module `make_operation(..., affine=False)` of that operation.
        Edges that share a pool share its running statistics. All other tensors have their names in `state_dict()`.
        """
        tensors = {name: value for name, value in self.state_dict().items() if ".edge_groups." not in name}
        for index, cell in enumerate(self.cells):
            assert isinstance(cell, MixedCell)
            for edge, operation, name, view in cell.edge_tensors():
                tensors[f"cells.{index}.edges.{edge}.{operation}.{name}"] = view
        return tensors
