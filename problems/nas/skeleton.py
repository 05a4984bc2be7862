"""The macro skeleton that supernet and evaluation network share: stems, the plan of the cells, cell inputs."""

from collections.abc import Iterable
from functools import reduce
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from problems.nas.operations import FactorizedReduce, relu_conv_bn


class CellPlan(NamedTuple):
    """What a cell must know of its place: channels of its two inputs and its own, and who halves the resolution."""

    input_channels: tuple[int, int]
    channels: int
    reduces: bool
    follows_reduction: bool


class CifarStem(nn.Module):
    """3x3 convolution to 3 x channels, batch norm; both cell inputs are its output, at the images' resolution."""

    reduces = False

    def __init__(self, image_channels: int, channels: int) -> None:
        super().__init__()
        self.out_channels = (3 * channels, 3 * channels)
        self.body = nn.Sequential(
            nn.Conv2d(image_channels, 3 * channels, 3, padding=1, bias=False), nn.BatchNorm2d(3 * channels)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map (N, image_channels, H, W) to the first cell's inputs, both (N, 3 channels, H, W)."""
        features = self.body(images)
        return features, features


class ImageNetStem(nn.Module):
    """Three 3x3 convolutions of stride 2: the cell inputs are at a quarter and an eighth of the images' resolution."""

    reduces = True

    def __init__(self, image_channels: int, channels: int) -> None:
        super().__init__()
        self.out_channels = (channels, channels)
        self.quarter = nn.Sequential(
            *_halve(image_channels, channels // 2), nn.ReLU(), *_halve(channels // 2, channels)
        )
        self.eighth = nn.Sequential(nn.ReLU(), *_halve(channels, channels))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map (N, image_channels, H, W) to (N, channels, H/4, W/4) and (N, channels, H/8, W/8), rounded up."""
        quarter = self.quarter(images)
        return quarter, self.eighth(quarter)


def _halve(in_channels: int, out_channels: int) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(out_channels)


class CellInputs(nn.Module):
    """Bring a cell's two inputs to its number of channels and to the resolution of the second."""

    def __init__(self, plan: CellPlan, affine: bool) -> None:
        super().__init__()
        before, last = plan.input_channels
        align = FactorizedReduce if plan.follows_reduction else relu_conv_bn
        self.before = align(before, plan.channels, affine)
        self.last = relu_conv_bn(last, plan.channels, affine)

    def forward(self, before: Tensor, last: Tensor) -> list[Tensor]:
        """Return the cell's first two states, of one shape."""
        return [self.before(before), self.last(last)]


Stem = CifarStem | ImageNetStem

StemName = Literal["cifar", "imagenet"]
_STEMS: dict[str, type[CifarStem] | type[ImageNetStem]] = {"cifar": CifarStem, "imagenet": ImageNetStem}


def stem_for(image_size: int) -> StemName:
    """The stem for images of this height: ImageNet's, which quarters and then halves them, above 64 pixels."""
    return "cifar" if image_size <= 64 else "imagenet"


def make_stem(name: StemName, image_channels: int, channels: int) -> Stem:
    """Build a stem. Raises ValueError for an unknown name."""
    if name not in _STEMS:
        raise ValueError(f"{name!r} is not a stem; valid: {', '.join(_STEMS)}")
    return _STEMS[name](image_channels, channels)


def plan_cells(stem: Stem, channels: int, cells: int, nodes: int) -> list[CellPlan]:
    """Place `cells` cells, the first of `channels` channels; those at a third and two thirds reduce and double them.

    A cell's output has nodes x its own channels. Raises ValueError for fewer than one cell.
    """
    if cells < 1:
        raise ValueError(f"a network needs at least 1 cell, not {cells}")
    plans: list[CellPlan] = []
    before, last = stem.out_channels
    follows_reduction = stem.reduces
    for index in range(cells):
        reduces = index in (cells // 3, 2 * cells // 3)
        channels *= 2 if reduces else 1
        plans.append(CellPlan((before, last), channels, reduces, follows_reduction))
        before, last, follows_reduction = last, nodes * channels, reduces
    return plans


def edge_stride(plan: CellPlan, source: int) -> int:
    """The stride of an edge out of state `source`: 2 where a reduction cell reads its inputs, else 1."""
    return 2 if plan.reduces and source < 2 else 1


def total(terms: Iterable[Tensor]) -> Tensor:
    """Sum tensors of one shape, without the addition to zero that `sum` begins with."""
    return reduce(torch.add, terms)
