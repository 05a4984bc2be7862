"""The evaluation network: the network that a genotype describes, which is trained from scratch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from problems.nas.auxiliary_head import AuxiliaryHead
from problems.nas.drop_path import apply_drop_path
from problems.nas.genotype import Choice, Genotype
from problems.nas.operations import make_operation
from problems.nas.skeleton import CellInputs, CellPlan, Stem, StemName, edge_stride, make_stem, plan_cells


class Predictions(NamedTuple):
    """Class logits, (N, classes), and those of the auxiliary head, or None without a head or in evaluation mode."""

    logits: Tensor
    auxiliary: Tensor | None


class GenotypeEdge(nn.Module):
    """One edge of a genotype: its operation on its source state. In training, drop-path unless it is the identity."""

    def __init__(self, choice: Choice, plan: CellPlan) -> None:
        super().__init__()
        self.source = choice.source
        self.operation = make_operation(choice.operation, plan.channels, edge_stride(plan, choice.source), affine=True)
        self.droppable = not isinstance(self.operation, nn.Identity)

    def forward(self, states: Sequence[Tensor], drop_path: float | Tensor | None) -> Tensor:
        """Apply the operation to the source, one of the states that the cell has computed so far."""
        output: Tensor = self.operation(states[self.source])
        if drop_path is None or not self.training or not self.droppable:
            return output
        return apply_drop_path(output, drop_path)


class GenotypeCell(nn.Module):
    """A cell in which each node is the sum of its two edges; the output concatenates the nodes."""

    def __init__(self, genotype: Genotype, plan: CellPlan) -> None:
        super().__init__()
        self.inputs = CellInputs(plan, affine=True)
        nodes = genotype.cell("reduce" if plan.reduces else "normal")
        self.edges = nn.ModuleList(GenotypeEdge(choice, plan) for node in nodes for choice in node)

    def forward(self, before: Tensor, last: Tensor, drop_path: float | Tensor | None) -> Tensor:
        """Map the outputs of the two previous cells to this cell's output, nodes x channels wide."""
        states: list[Tensor] = self.inputs(before, last)
        for index in range(0, len(self.edges), 2):
            first, second = self.edges[index], self.edges[index + 1]
            states.append(first(states, drop_path) + second(states, drop_path))
        return torch.cat(states[2:], dim=1)


class EvaluationNetwork(nn.Module):
    """The network that a genotype describes, with affine batch norms, drop-path and an optional auxiliary head.

    The defaults are those for CIFAR. For ImageNet use stem="imagenet", 48 channels, 14 cells and 1000 classes (Liu et
    al. 2019, DARTS, section 3.2).

    Args:
        genotype: the normal and the reduction cell.
        channels: of the first cell; they double at the two reduction cells, a third and two thirds of the way through.
        cells: the number of cells.
        classes: the number of classes.
        image_channels: the number of channels of the images.
        auxiliary: whether to add an auxiliary head.
        stem: "cifar" or "imagenet".

    Raises:
        ValueError: for an unknown stem, or fewer than one cell.
    """

    def __init__(
        self,
        genotype: Genotype,
        channels: int = 36,
        cells: int = 20,
        classes: int = 10,
        image_channels: int = 3,
        auxiliary: bool = False,
        stem: StemName = "cifar",
    ) -> None:
        super().__init__()
        self.stem: Stem = make_stem(stem, image_channels, channels)
        plans = plan_cells(self.stem, channels, cells, genotype.nodes)
        self.cells = nn.ModuleList(GenotypeCell(genotype, plan) for plan in plans)
        self.classifier = nn.Linear(genotype.nodes * plans[-1].channels, classes)
        self.auxiliary_after = 2 * cells // 3
        auxiliary_channels = genotype.nodes * plans[self.auxiliary_after].channels
        self.auxiliary = AuxiliaryHead(auxiliary_channels, classes, stem) if auxiliary else None

    def forward(self, images: Tensor, drop_path: float | Tensor | None = None) -> Predictions:
        """Classify images of shape (N, image_channels, H, W).

        Args:
            images: the images.
            drop_path: the probability of drop-path, applied only in training; None: no random numbers are drawn.

        Raises:
            ValueError: if `drop_path` is not in [0, 1), or the images are too small for the auxiliary head.
        """
        if isinstance(drop_path, float | int) and not 0 <= drop_path < 1:
            raise ValueError(f"the drop-path probability must be in [0, 1), not {drop_path}")
        auxiliary = None
        before, last = self.stem(images)
        for index, cell in enumerate(self.cells):
            before, last = last, cell(before, last, drop_path)
            if self.training and self.auxiliary is not None and index == self.auxiliary_after:
                auxiliary = self.auxiliary(last)
        return Predictions(self.classifier(last.mean(dim=(2, 3))), auxiliary)
