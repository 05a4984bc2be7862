"""The supernet of a cell-based search space, in which every edge is a weighted mixture of all its operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from problems.nas.grouped_edges import Fan, pixels_of
from problems.nas.skeleton import CellInputs, CellPlan, Stem, StemName, edge_stride, make_stem, plan_cells, total
from problems.nas.space import DARTS, ArchitectureLogits, CellKind, Mixture, SearchSpace


class Architecture(nn.Module):
    """The continuous architecture: one logit an edge and operation, for normal and for reduction cells.

    Both parameters have the space's shape, 14 x 8 in the DARTS space, and start at 1e-3 N(0, 1). Where edges have
    weights, their logits are the last column.
    """

    def __init__(self, space: SearchSpace = DARTS) -> None:
        super().__init__()
        self.normal = nn.Parameter(1e-3 * torch.randn(space.shape))
        self.reduce = nn.Parameter(1e-3 * torch.randn(space.shape))

    def forward(self) -> ArchitectureLogits:
        """Return the logits themselves; the softmax over operations is the supernet's."""
        return ArchitectureLogits(self.normal, self.reduce)


class MixedCell(nn.Module):
    """A cell in which each node is the sum of the mixed edges from all earlier states; the nodes are concatenated.

    All edges that leave one state are computed together, by a :class:`Fan`; none leave the last node. Of K parts of
    the channels (`space.partial`), the first goes through the edges, the others past them, and a node deals its
    channels out to K groups again.
    """

    def __init__(self, space: SearchSpace, plan: CellPlan) -> None:
        super().__init__()
        self.partial, self.mixed_channels = space.partial, plan.channels // space.partial
        self.kind: CellKind = "reduce" if plan.reduces else "normal"
        self.inputs = CellInputs(plan, affine=False)
        self.fans = nn.ModuleList()
        self.targets: list[list[int]] = []
        for source in range(space.nodes + 1):
            nodes = {row: edge.node for row, edge in enumerate(space.edges) if edge.source == source}
            edges = {row: space.choices(self.kind)[row] for row in nodes}
            self.fans.append(Fan(edges, space.operations, self.mixed_channels, edge_stride(plan, source)))
            self.targets.append([*nodes.values()])

    def forward(self, before: Tensor, last: Tensor, weights: Mixture, skip_dropout: float) -> Tensor:
        """Map the outputs of the two cells before to this cell's, nodes x channels wide."""
        states: list[Tensor] = self.inputs(before, last)
        mixed: list[list[Tensor]] = [[] for _ in self.fans[1:]]
        passed: list[list[Tensor]] = [[] for _ in mixed]
        for source, (fan, targets) in enumerate(zip(self.fans, self.targets, strict=True)):
            assert isinstance(fan, Fan)
            if source >= 2:
                states.append(self._node(mixed[source - 2], passed[source - 2]))
            state = states[source]
            if self.partial > 1:
                state, rest = state.split([self.mixed_channels, state.shape[1] - self.mixed_channels], dim=1)
                for node, term in zip(targets, self._pass(fan, rest, weights.edges), strict=True):
                    passed[node].append(term)
            for node, terms in zip(targets, fan(state, weights.operations, skip_dropout), strict=True):
                mixed[node] += terms
        states.append(self._node(mixed[-1], passed[-1]))
        return torch.cat(states[2:], dim=1)

    def _pass(self, fan: Fan, rest: Tensor, weights: Tensor | None) -> list[Tensor]:
        """What passes each edge of a fan by, (N, H', W', channels), times the edge's weight."""
        pixels = pixels_of(rest if fan.stride == 1 else F.max_pool2d(rest, 2, 2, ceil_mode=True))
        return [pixels if weights is None else pixels * weights[edge] for edge in fan.edges]

    def _node(self, mixed: list[Tensor], passed: list[Tensor]) -> Tensor:
        """Sum up a node, (N, channels, H, W), of terms in the order of pixels."""
        pixels = total(mixed)
        if passed:
            groups = torch.cat([pixels, total(passed)], dim=-1).unflatten(-1, (self.partial, self.mixed_channels))
            pixels = groups.transpose(-1, -2).flatten(-2)
        return pixels.permute(0, 3, 1, 2)

    def edge_tensors(self) -> list[tuple[int, str, str, Tensor]]:
        """List (edge, operation, name, view) of the fans' weights and statistics, edge after edge."""
        fans = (fan for fan in self.fans if isinstance(fan, Fan))
        return sorted((entry for fan in fans for entry in fan.edge_tensors()), key=lambda entry: entry[0])


class Supernet(nn.Module):
    """All architectures of a space in one network, mixed by the weights it is called with.

    `channels` are those of the first cell; they double at the two reduction cells, a third and two thirds into
    `cells`. Images (N, image_channels, H, W) may be of any size that survives two halvings, and three more with the
    ImageNet stem. Architecture parameters are an input, not a part, so `parameters()` are the weights alone.

    Attributes:
        skip_dropout: the probability of dropout behind skip-connections of stride 1 in training, in [0, 1), which may
            be set at any time (Chen et al. 2019, P-DARTS, section 3.3).

    Raises ValueError for fewer than one cell, an unknown stem, or channels that `space.partial` does not divide.
    """

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
            raise ValueError(f"{channels} channels cannot be parted in {space.partial}; take a multiple of it")
        self.space = space
        self.skip_dropout = 0.0
        # The stem is 3 times as wide as the first cell: CIFAR's always is, ImageNet's in search (PC-DARTS' own code).
        self.stem: Stem = make_stem(stem, image_channels, channels if stem == "cifar" else 3 * channels)
        plans = plan_cells(self.stem, channels, cells, space.nodes)
        self.cells = nn.ModuleList(MixedCell(space, plan) for plan in plans)
        self.classifier = nn.Linear(space.nodes * plans[-1].channels, classes)

    def forward(self, images: Tensor, weights: ArchitectureLogits) -> Tensor:
        """Return the class logits, (N, classes), under the architecture logits that `Architecture()` returns.

        Raises ValueError if the shape of the architecture logits is not that of the space, or if `skip_dropout` is no
        probability below 1.
        """
        self.space.check(weights)
        if not 0 <= self.skip_dropout < 1:
            raise ValueError(f"skip_dropout must be in [0, 1), not {self.skip_dropout}")
        mixtures = {
            "normal": self.space.mixture("normal", weights.normal),
            "reduce": self.space.mixture("reduce", weights.reduce),
        }
        before, last = self.stem(images.contiguous(memory_format=torch.channels_last))
        for cell in self.cells:
            assert isinstance(cell, MixedCell)
            before, last = last, cell(before, last, mixtures[cell.kind], self.skip_dropout)
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
