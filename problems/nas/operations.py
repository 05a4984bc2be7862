"""The candidate operations: those of the DARTS space, and noise, a useless one for testing searches."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from problems.nas.operation_names import NOISE, explain_unknown


class FactorizedReduce(nn.Module):
    """Halve the resolution with two 1x1 convolutions of stride 2, the second shifted by one pixel; then batch norm.

    Maps (N, in_channels, H, W) to (N, out_channels, ceil(H/2), ceil(W/2)). If H or W is odd, the shifted convolution
    pads it with a row or column of zeros.
    """

    def __init__(self, in_channels: int, out_channels: int, affine: bool) -> None:
        super().__init__()
        half = out_channels // 2
        self.aligned = nn.Conv2d(in_channels, half, 1, stride=2, bias=False)
        self.shifted = nn.Conv2d(in_channels, out_channels - half, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels, affine=affine)

    def forward(self, features: Tensor) -> Tensor:
        """Halve the resolution of the features."""
        features = F.relu(features)
        height, width = features.shape[2:]
        shifted = F.pad(features, (-1, width % 2, -1, height % 2))
        output: Tensor = self.norm(torch.cat([self.aligned(features), self.shifted(shifted)], dim=1))
        return output


class Noise(nn.Module):
    """Replace the features with standard normal noise, drawn again at each call, in training and in evaluation.

    Maps (N, C, H, W) to (N, C, ceil(H/stride), ceil(W/stride)). Like dropout masks, the noise comes from the global
    generator of the features' device. No batch norm follows. A search that chooses it has failed. It is the second
    operation of space S4 in Zela et al. 2020, Understanding and Robustifying Differentiable Architecture Search,
    arXiv:1909.09656, section 3.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, features: Tensor) -> Tensor:
        """Return noise of the output's shape."""
        samples, channels, *sizes = features.shape
        height, width = (-(-size // self.stride) for size in sizes)
        return torch.randn(samples, channels, height, width, dtype=features.dtype, device=features.device)


def relu_conv_bn(in_channels: int, out_channels: int, affine: bool) -> nn.Sequential:
    """ReLU, 1x1 convolution, batch norm: maps the input of a cell to the cell's number of channels."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels, affine=affine),
    )


def make_operation(name: str, channels: int, stride: int, affine: bool) -> nn.Module:
    """Build an operation that maps (N, channels, H, W) to (N, channels, ceil(H/stride), ceil(W/stride)).

    Args:
        name: one of `BUILDABLE`.
        channels: the number of channels of input and output.
        stride: 1 or 2.
        affine: True for the evaluation network, whose batch norms have scale and shift. False for the search, where
            they have none, since the weight of the operation already scales its output; a batch norm follows each
            pool, to bring it to the scale of the convolutions (Liu et al. 2019, DARTS, section 3.1, appendix A).

    Raises:
        ValueError: if `name` is not in `BUILDABLE`; "none" is not, since it has no module.
    """
    if name not in _BUILDERS:
        raise ValueError(explain_unknown(name))
    return _BUILDERS[name](channels, stride, affine)


def _depthwise(channels: int, kernel: int, stride: int, dilation: int, affine: bool) -> list[nn.Module]:
    padding = dilation * (kernel - 1) // 2
    return [
        nn.ReLU(),
        nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    ]


def _separable(kernel: int) -> Callable[[int, int, bool], nn.Module]:
    return lambda channels, stride, affine: nn.Sequential(
        *_depthwise(channels, kernel, stride, 1, affine),
        *_depthwise(channels, kernel, 1, 1, affine),
    )


def _dilated(kernel: int) -> Callable[[int, int, bool], nn.Module]:
    return lambda channels, stride, affine: nn.Sequential(*_depthwise(channels, kernel, stride, 2, affine))


def _skip(channels: int, stride: int, affine: bool) -> nn.Module:
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine)


def _max_pool(channels: int, stride: int, affine: bool) -> nn.Module:
    return _pool(nn.MaxPool2d(3, stride, padding=1), channels, affine)


def _average_pool(channels: int, stride: int, affine: bool) -> nn.Module:
    return _pool(nn.AvgPool2d(3, stride, padding=1, count_include_pad=False), channels, affine)


def _pool(pool: nn.Module, channels: int, affine: bool) -> nn.Module:
    return pool if affine else nn.Sequential(pool, nn.BatchNorm2d(channels, affine=False))


def _noise(channels: int, stride: int, affine: bool) -> nn.Module:
    return Noise(stride)


_BUILDERS: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "max_pool_3x3": _max_pool,
    "avg_pool_3x3": _average_pool,
    "skip_connect": _skip,
    "sep_conv_3x3": _separable(3),
    "sep_conv_5x5": _separable(5),
    "dil_conv_3x3": _dilated(3),
    "dil_conv_5x5": _dilated(5),
    NOISE: _noise,
}
