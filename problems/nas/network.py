"""The evaluation network: the discrete network of a genotype, to be trained from scratch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from problems.nas.genotype import Choice, Genotype
from problems.nas.operations import make_operation
from problems.nas.skeleton import CellInputs, CellPlan, Stem, StemName, edge_stride, make_stem, plan_cells


class Predictions(NamedTuple):
    """Class logits, (N, classes), and those of the auxiliary head, None where there is no head or no training."""

    logits: Tensor
    auxiliary: Tensor | None


def drop_samples(features: Tensor, probability: float | Tensor) -> Tensor:
    """Zero each sample of (N, C, H, W) with `probability`, and divide the others by what is kept.

    Larsson, Maire and Shakhnarovich 2017, FractalNet, arXiv:1605.07648; per sample and scaled as in DARTS.
    """
    keep = features.new_ones(()) - probability
    return features * (torch.bernoulli(keep.expand(len(features), 1, 1, 1)) / keep)


class GenotypeEdge(nn.Module):
    """One kept edge: its operation on its source state, under drop-path in training unless it is the identity."""

    def __init__(self, choice: Choice, plan: CellPlan) -> None:
        super().__init__()
        self.source = choice.source
        self.operation = make_operation(choice.operation, plan.channels, edge_stride(plan, choice.source), affine=True)
        self.droppable = not isinstance(self.operation, nn.Identity)

    def forward(self, states: Sequence[Tensor], drop_path: float | Tensor) -> Tensor:
        """Apply the edge to the state it reads, of those that the cell has so far."""
        output: Tensor = self.operation(states[self.source])
        return drop_samples(output, drop_path) if self.training and self.droppable else output


class GenotypeCell(nn.Module):
    """A cell in which each node is the sum of the two edges that the genotype keeps; the nodes are concatenated."""

    def __init__(self, genotype: Genotype, plan: CellPlan) -> None:
        super().__init__()
        self.inputs = CellInputs(plan, affine=True)
        nodes = genotype.cell("reduce" if plan.reduces else "normal")
        self.edges = nn.ModuleList(GenotypeEdge(choice, plan) for node in nodes for choice in node)

    def forward(self, before: Tensor, last: Tensor, drop_path: float | Tensor) -> Tensor:
        """Map the outputs of the two cells before to this cell's, nodes x channels wide."""
        states: list[Tensor] = self.inputs(before, last)
        for index in range(0, len(self.edges), 2):
            first, second = self.edges[index], self.edges[index + 1]
            states.append(first(states, drop_path) + second(states, drop_path))
        return torch.cat(states[2:], dim=1)


class AuxiliaryHead(nn.Module):
    """A second classifier on the features after two thirds of the cells, which shortens the gradient's way in training.

    ReLU, 5x5 average pool, 1x1 convolution to 128, 2x2 convolution to 768, linear. As in DARTS, the ImageNet head
    pools with stride 2 rather than 3 and has no batch norm after the 2x2 convolution.
    """

    def __init__(self, channels: int, classes: int, stem: StemName) -> None:
        super().__init__()
        imagenet = stem == "imagenet"
        self.pool_stride = 2 if imagenet else 3
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.AvgPool2d(5, stride=self.pool_stride, count_include_pad=False),
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.Identity() if imagenet else nn.BatchNorm2d(768),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(768, classes)

    def forward(self, features: Tensor) -> Tensor:
        """Return class logits, (N, classes), of (N, channels, H, W). Raises ValueError if H or W is too small."""
        smallest = 5 + self.pool_stride
        if min(features.shape[2:]) < smallest:
            raise ValueError(
                f"the auxiliary head needs feature maps of at least {smallest}x{smallest} (images of "
                f"{4 * smallest}x{4 * smallest} with the CIFAR stem, {32 * smallest}x{32 * smallest} with ImageNet's) "
                f"but got {features.shape[2]}x{features.shape[3]}; "
                "use larger images or build the network with auxiliary=False"
            )
        logits: Tensor = self.classifier(self.body(features).mean(dim=(2, 3)))
        return logits


class EvaluationNetwork(nn.Module):
    """The network that a genotype stands for, with affine batch norms, drop-path and an optional auxiliary head.

    `channels` are those of the first cell; they double at the two reduction cells, a third and two thirds into
    `cells`. The defaults are those for CIFAR; for ImageNet take stem="imagenet", 48 channels, 14 cells and 1000
    classes (Liu et al. 2019, DARTS, section 3.2).

    Raises ValueError for an unknown stem or fewer than one cell.
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

    def forward(self, images: Tensor, drop_path: float | Tensor = 0.0) -> Predictions:
        """Classify images (N, image_channels, H, W), dropping paths with this probability in training.

        Raises ValueError for a probability outside [0, 1), and for images too small for the auxiliary head.
        """
        if not isinstance(drop_path, Tensor) and not 0 <= drop_path < 1:
            raise ValueError(f"the drop-path probability must be in [0, 1), not {drop_path}")
        auxiliary = None
        before, last = self.stem(images)
        for index, cell in enumerate(self.cells):
            before, last = last, cell(before, last, drop_path)
            if self.training and self.auxiliary is not None and index == self.auxiliary_after:
                auxiliary = self.auxiliary(last)
        return Predictions(self.classifier(last.mean(dim=(2, 3))), auxiliary)
