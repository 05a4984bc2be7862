"""Size-preserving convolutions of stride 1 whose gradients use kernels that are fast on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad


def convolve(features: Tensor, weight: Tensor, dilation: int = 1, groups: int = 1) -> Tensor:
    """Convolve (N, C, H, W) with a `weight` of shape (C', C / groups, k, k), k odd, to (N, C', H, W).

    Computes what `F.conv2d` computes with stride 1 and size-preserving padding, with derivatives of any order. On a
    CPU it differs in how gradients are computed, because oneDNN has no fast kernels for some of them: the gradient
    with respect to the features is a forward convolution, and the gradient with respect to a dilated or 5x5 weight is
    assembled from gradients with respect to undilated weights 3 columns wide.
    """
    if features.device.type != "cpu" or _has_tangent(features, weight):
        return F.conv2d(features, weight, None, 1, _padding(weight, dilation), dilation, groups)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        features, weight = features.to(dtype), weight.to(dtype)
    output: Tensor = _Convolution.apply(features, weight, dilation, groups)
    return output


def _may_call_onednn() -> bool:
    """Whether oneDNN can be called directly; torch.compile does not know its operator and chooses kernels itself."""
    return not torch.compiler.is_compiling() and torch.backends.mkldnn.is_available()


def _has_tangent(*tensors: Tensor) -> bool:
    """Whether forward-mode differentiation is active. `_Convolution` has no jvp rule, since Dynamo rejects those."""
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _padding(weight: Tensor, dilation: int) -> int:
    return dilation * (weight.shape[-1] // 2)


def _transposed(weight: Tensor, groups: int) -> Tensor:
    """The weight of the transposed convolution (also of stride 1): inputs and outputs swapped, spatially flipped."""
    grouped: Tensor = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return grouped.flip(-1, -2) if weight.shape[-1] > 1 else grouped


class _Convolution(torch.autograd.Function):
    """(features, weight) -> output. It is bilinear, so its backward is itself and `_WeightGradient`."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, dilation: int, groups: int) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.dilation, ctx.groups = dilation, groups
        padding = _padding(weight, dilation)
        if padding == 0 and groups > 1 and weight.dtype == torch.float32 and _may_call_onednn():
            # With a small batch and few threads, F.conv2d runs the groups of a 1x1 weight one after another.
            return torch.mkldnn_convolution(features, weight, None, (0, 0), (1, 1), (1, 1), groups)
        return F.conv2d(features, weight, None, 1, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        features, weight = ctx.saved_tensors
        dilation, groups = ctx.dilation, ctx.groups
        for_features = for_weight = None
        if ctx.needs_input_grad[0]:
            for_features = _Convolution.apply(cotangent, _transposed(weight, groups), dilation, groups)
        if ctx.needs_input_grad[1]:
            for_weight = _WeightGradient.apply(features, cotangent, weight.shape[-1], dilation, groups)
        return for_features, for_weight, None, None


class _WeightGradient(torch.autograd.Function):
    """(features, cotangent of the output) -> cotangent of the weight. It is bilinear as well."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, cotangent: Tensor, size: int, dilation: int, groups: int) -> Tensor:
        ctx.save_for_backward(features, cotangent)
        ctx.dilation, ctx.groups = dilation, groups
        if size == 1:
            matrices = torch.bmm(_grouped(cotangent, groups).transpose(1, 2), _grouped(features, groups))
            return matrices.flatten(0, 1)[..., None, None]
        if dilation > 1:
            features, cotangent = _phases(features, dilation), _phases(cotangent, dilation)
        if size != 5:
            return _columns(features, cotangent, size, size, groups)
        # oneDNN is fast for weights 3 columns wide: take the left 3 and the right 3 columns; they share one.
        features = F.pad(features, (1, 1))
        left = _columns(features, F.pad(cotangent, (0, 2)), 5, 3, groups)
        right = _columns(features, F.pad(cotangent, (2, 0)), 5, 3, groups)
        return torch.cat([left, right[..., 1:]], dim=-1)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        features, of_output = ctx.saved_tensors
        dilation, groups = ctx.dilation, ctx.groups
        for_features = for_output = None
        if ctx.needs_input_grad[0]:
            for_features = _Convolution.apply(of_output, _transposed(cotangent, groups), dilation, groups)
        if ctx.needs_input_grad[1]:
            for_output = _Convolution.apply(features, cotangent, dilation, groups)
        return for_features, for_output, None, None, None


def _grouped(features: Tensor, groups: int) -> Tensor:
    """Reshape (N, C, H, W) to (groups, N H W, C / groups), a view if the features are channels-last."""
    pixels = features.permute(0, 2, 3, 1)
    return pixels.reshape(-1, groups, pixels.shape[-1] // groups).transpose(0, 1)


def _phases(features: Tensor, dilation: int) -> Tensor:
    """Split each image into dilation^2 smaller ones, on which the dilated convolution is an undilated one."""
    height, width = features.shape[2:]
    if height % dilation or width % dilation:
        features = F.pad(features, (0, -width % dilation, 0, -height % dilation))
    pixels: Tensor = features.permute(0, 2, 3, 1).unflatten(2, (-1, dilation)).unflatten(1, (-1, dilation))
    return pixels.permute(2, 4, 0, 1, 3, 5).flatten(0, 2).permute(0, 3, 1, 2)


def _columns(features: Tensor, cotangent: Tensor, height: int, width: int, groups: int) -> Tensor:
    """The gradient with respect to an undilated weight of this height and width."""
    shape = (cotangent.shape[1], features.shape[1] // groups, height, width)
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        cotangent, features, features.new_empty(shape), None, [1, 1], [height // 2, width // 2], [1, 1],
        False, [0, 0], groups, [False, True, False],
    )  # fmt: skip
    return gradients[1]
