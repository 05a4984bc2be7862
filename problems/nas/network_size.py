"""The size of a network: its number of parameters, and of multiply-adds for one image."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from problems.nas.evaluation_network import EvaluationNetwork


class NetworkSize(NamedTuple):
    """The number of parameters of a network, and of multiply-adds for one image."""

    parameters: int
    multiply_adds: int


def size_of(network: nn.Module, image_shape: Sequence[int] = (3, 32, 32)) -> NetworkSize:
    """Count parameters and multiply-adds as the DARTS papers do, without the auxiliary head used only in training.

    Multiply-adds are those of convolutions and matrix products in evaluation mode; the papers call them "FLOPs".
    Nothing is computed and the network does not change. It may be on any device, including "meta":

        >>> with torch.device("meta"):
        ...     network = EvaluationNetwork(PUBLISHED["DARTS_V2"])
        >>> size_of(network)
        NetworkSize(parameters=3349342, multiply_adds=528359040)

    Args:
        network: takes images of shape (N, C, H, W).
        image_shape: (C, H, W) of one image.

    Raises:
        ValueError: if `image_shape` is not three positive numbers.
    """
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(
            f"image_shape must be (channels, height, width), three positive numbers, not {tuple(image_shape)}"
        )
    shapes = _without_data(network).eval()
    if isinstance(shapes, EvaluationNetwork):
        shapes.auxiliary = None
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shapes(torch.empty(1, *image_shape, device="meta"))
    return NetworkSize(sum(p.numel() for p in shapes.parameters()), counter.get_total_flops() // 2)


def _without_data(network: nn.Module) -> nn.Module:
    """A copy of the network on the meta device: its tensors have shapes but no values."""
    copies: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in network.buffers()}
    copies |= {id(parameter): nn.Parameter(_shape_of(parameter)) for parameter in network.parameters()}
    return deepcopy(network, copies)


def _shape_of(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().to("meta", torch.float32)
