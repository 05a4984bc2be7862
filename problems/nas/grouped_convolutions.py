"""The supernet's grouped convolutions: one kernel for several edges, with their channels side by side."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from problems.nas.cpu_convolution import convolve


class ScaledNorm(nn.Module):
    """Batch norm without parameters, whose scale is an argument: it normalizes and weights features in one kernel."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, features: Tensor, scale: Tensor | None = None) -> Tensor:
        """Normalize features of shape (N, C, H, W) and multiply them by `scale` of shape (C,)."""
        return F.batch_norm(features, self.running_mean, self.running_var, scale, None, self.training)


def pixels_of(features: Tensor) -> Tensor:
    """View (N, C, H, W) as (N, H, W, C), the order of a channels-last tensor in memory."""
    return features.permute(0, 2, 3, 1)


class GroupedStage(nn.Module):
    """Depthwise convolution, 1x1 convolution and batch norm of `count` edges, each `channels` wide."""

    def __init__(self, channels: int, count: int, kernel: int, stride: int, dilation: int) -> None:
        super().__init__()
        wide, padding = count * channels, dilation * (kernel // 2)
        self.count = count
        self.depthwise = nn.Conv2d(wide, wide, kernel, stride, padding, dilation, groups=wide, bias=False)
        self.pointwise = nn.Conv2d(wide, wide, 1, groups=count, bias=False)
        self.norm = ScaledNorm(wide)

    def forward(self, features: Tensor, scale: Tensor | None = None) -> Tensor:
        """Map (N, count x channels, H, W) to (N, count x channels, ceil(H/stride), ceil(W/stride))."""
        stride, dilation = self.depthwise.stride[0], self.depthwise.dilation[0]
        weight, groups = self.depthwise.weight, self.depthwise.groups
        if stride == 1:
            features = convolve(features, weight, dilation, groups)
        elif stride == dilation:  # it reads only every other pixel, and among those pixels it is not dilated
            features = convolve(features[:, :, ::stride, ::stride], weight, 1, groups)
        else:
            features = self.depthwise(features)
        return cast(Tensor, self.norm(convolve(features, self.pointwise.weight, groups=self.count), scale))


class GroupedConvolutions(nn.Module):
    """A separable (two stages) or dilated (one stage) convolution on `count` edges, with ReLU between stages."""

    def __init__(self, channels: int, count: int, kernel: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList([GroupedStage(channels, count, kernel, stride, dilation)])
        if dilation == 1:
            self.stages.append(GroupedStage(channels, count, kernel, 1, 1))

    def forward(self, rectified: Tensor, scale: Tensor) -> Tensor:
        """Map features after a ReLU, (N, count x channels, H, W), to outputs at the stride, times `scale`."""
        *first, last = self.stages
        for stage in first:
            rectified = F.relu(stage(rectified))
        return cast(Tensor, last(rectified, scale))


class GroupedFactorizedReduce(nn.Module):
    """The skip-connection of stride 2 on `count` edges; see :class:`problems.nas.operations.FactorizedReduce`."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.halves = (channels // 2, channels - channels // 2)
        self.channels, self.count = channels, count
        self.aligned = nn.Conv2d(channels, count * self.halves[0], 1, stride=2, bias=False)
        self.shifted = nn.Conv2d(channels, count * self.halves[1], 1, stride=2, bias=False)
        self.norm = ScaledNorm(count * channels)

    def forward(self, rectified: Tensor, scale: Tensor) -> Tensor:
        """Map features after a ReLU, (N, channels, H, W), to (N, count x channels, ceil(H/2), ceil(W/2))."""
        height, width = rectified.shape[2:]
        shifted = self.shifted(F.pad(rectified, (-1, width % 2, -1, height % 2)))
        pairs = zip((self.aligned(rectified), shifted), self.halves, strict=True)
        both = [pixels_of(features).unflatten(-1, (self.count, half)) for features, half in pairs]
        return cast(Tensor, self.norm(torch.cat(both, dim=-1).flatten(-2).permute(0, 3, 1, 2), scale))
