"""The size of a network: its parameters, and the multiply-adds that one image takes."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from problems.nas.network import EvaluationNetwork


class Counts(NamedTuple):
    """How many parameters a network has, and how many multiply-adds it takes for one image."""

    parameters: int
    multiply_adds: int


def count(network: nn.Module, image_shape: Sequence[int] = (3, 32, 32)) -> Counts:
    """Count as papers on the DARTS family do: without the auxiliary head, which only training has.

    Multiply-adds are those of convolutions and matrix products in evaluation, for one image of `image_shape`, (C, H,
    W); published "FLOPs" are these. Nothing is computed and the network is left as it is, so it may live on any
    device, "meta" among them:

        >>> with torch.device("meta"):
        ...     network = EvaluationNetwork(PUBLISHED["DARTS_V2"])
        >>> count(network)
        Counts(parameters=3349342, multiply_adds=528359040)

    Raises ValueError if `image_shape` is not three positive numbers.
    """
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape must be (channels, height, width), not {tuple(image_shape)}")
    shapes = _without_data(network).eval()
    if isinstance(shapes, EvaluationNetwork):
        shapes.auxiliary = None
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shapes(torch.empty(1, *image_shape, device="meta"))
    return Counts(sum(p.numel() for p in shapes.parameters()), counter.get_total_flops() // 2)


def _without_data(network: nn.Module) -> nn.Module:
    """A copy of the network whose tensors have shapes alone."""
    read_cache: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in network.buffers()}
    read_cache |= {id(parameter): nn.Parameter(_shape_of(parameter)) for parameter in network.parameters()}
    return deepcopy(network, read_cache)


def _shape_of(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().to("meta", torch.float32)
