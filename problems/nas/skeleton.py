"""The macro skeleton shared by supernet and evaluation network: stems, where cells reduce, inputs of cells."""

from collections.abc import Iterable
from functools import reduce
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from problems.nas.operations import FactorizedReduce, relu_conv_bn


class CellPlan(NamedTuple):
    """The position of a cell in the network.

    Attributes:
        input_channels: of the outputs of the two previous cells.
        channels: of each of its nodes.
        reduces: whether this is a reduction cell, which halves the resolution.
        follows_reduction: whether the previous cell is one.
    """

    input_channels: tuple[int, int]
    channels: int
    reduces: bool
    follows_reduction: bool


class CifarStem(nn.Module):
    """3x3 convolution to 3 x channels and batch norm, at the images' resolution; both cell inputs are its output."""

    reduces = False

    def __init__(self, image_channels: int, channels: int) -> None:
        super().__init__()
        self.out_channels = (3 * channels, 3 * channels)
        self.body = nn.Sequential(
            nn.Conv2d(image_channels, 3 * channels, 3, padding=1, bias=False), nn.BatchNorm2d(3 * channels)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map (N, image_channels, H, W) to both inputs of the first cell, each (N, 3 x channels, H, W)."""
        features = self.body(images)
        return features, features


class ImageNetStem(nn.Module):
    """Three 3x3 convolutions of stride 2; the cell inputs have a quarter and an eighth of the images' resolution."""

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
    """Maps the two inputs of a cell to its number of channels and to the resolution of the second input."""

    def __init__(self, plan: CellPlan, affine: bool) -> None:
        super().__init__()
        before, last = plan.input_channels
        align = FactorizedReduce if plan.follows_reduction else relu_conv_bn
        self.before = align(before, plan.channels, affine)
        self.last = relu_conv_bn(last, plan.channels, affine)

    def forward(self, before: Tensor, last: Tensor) -> list[Tensor]:
        """Return the first two states of the cell, both of the same shape."""
        return [self.before(before), self.last(last)]


Stem = CifarStem | ImageNetStem

StemName = Literal["cifar", "imagenet"]
_STEMS: dict[str, type[CifarStem] | type[ImageNetStem]] = {"cifar": CifarStem, "imagenet": ImageNetStem}


def stem_for(image_size: int) -> StemName:
    """The stem for images of this height: ImageNet's, which quarters and then halves them, above 64 pixels."""
    return "cifar" if image_size <= 64 else "imagenet"


def make_stem(name: StemName, image_channels: int, channels: int) -> Stem:
    """Build a stem for `channels` channels in the first cell. Raises ValueError for an unknown name."""
    if name not in _STEMS:
        raise ValueError(f"{name!r} is not a stem; valid: {', '.join(_STEMS)}")
    return _STEMS[name](image_channels, channels)


def plan_cells(stem: Stem, channels: int, cells: int, nodes: int) -> list[CellPlan]:
    """Plan `cells` cells, the first with `channels` channels.

    The cells at one third and two thirds are reduction cells, and double the channels. The output of a cell has
    nodes x channels channels.

    Raises:
        ValueError: if `cells` is less than 1.
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
    """The stride of an edge from state `source`: 2 if a reduction cell reads one of its inputs, otherwise 1."""
    return 2 if plan.reduces and source < 2 else 1


def total(terms: Iterable[Tensor]) -> Tensor:
    """Sum tensors of the same shape. Unlike `sum`, it does not start by adding to zero."""
    return reduce(torch.add, terms)
