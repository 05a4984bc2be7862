"""Some operators of torch, computed with elementary ones: the same functions, with the same arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction as _Reduction


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """:func:`torch.nn.functional.batch_norm`, with its arguments and its effect on the running statistics."""
    dtype, input = input.dtype, full(input)
    others = [dim for dim in range(input.dim()) if dim != 1]
    mean, variance = running_mean, running_var
    if training:
        mean, variance = input.mean(others), input.var(others, correction=0)
        count = input.numel() / input.shape[1]
        if count == 1:
            raise ValueError(f"normalization takes more than one value per channel; the input has shape {input.shape}")
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.detach(), momentum)
            running_var.lerp_(variance.detach() * (count / (count - 1)), momentum)
    assert mean is not None and variance is not None, "torch requires them in evaluation mode"
    shape = [-1 if dim == 1 else 1 for dim in range(input.dim())]
    normal = (input - mean.view(shape)) * (variance + eps).rsqrt().view(shape)
    scaled = normal if weight is None else normal * weight.view(shape)
    return (scaled if bias is None else scaled + bias.view(shape)).to(dtype)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """:func:`torch.nn.functional.instance_norm`, with its arguments and its effect on the running statistics."""
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    instances, channels = input.shape[:2]

    def each(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.repeat(instances)

    joined = input.reshape(1, instances * channels, *input.shape[2:])
    mean, variance = each(running_mean), each(running_var)
    normal = _batch_norm(joined, mean, variance, each(weight), each(bias), True, momentum, eps)
    for running, after in ((running_mean, mean), (running_var, variance)):
        if running is not None and after is not None:
            running.copy_(after.view(instances, channels).mean(0))
    return normal.reshape(input.shape)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """:func:`torch.nn.functional.layer_norm`, with its arguments."""
    kept = torch.is_autocast_enabled("cuda") and input.device.type == "cuda"  # autocast on CUDA keeps it in float32
    dtype, input = torch.float32 if kept and input.dtype != torch.float64 else input.dtype, full(input)
    last = tuple(range(-len(normalized_shape), 0))
    variance, mean = torch.var_mean(input, last, correction=0, keepdim=True)
    normal = (input - mean) * (variance + eps).rsqrt()
    scaled = normal if weight is None else normal * weight
    return (scaled if bias is None else scaled + bias).to(dtype)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """:func:`torch.nn.functional.hardsigmoid`, with its arguments."""
    value = F.relu6(input + 3) / 6
    return input.copy_(value) if inplace else value


def _huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """:func:`torch.nn.functional.huber_loss`, with its arguments."""
    away = input - target
    size = away.abs()
    loss = torch.where(size <= delta, 0.5 * away.square(), delta * (size - 0.5 * delta))
    return _reduced(loss if weight is None else loss * weight, reduction)


def _soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """:func:`torch.nn.functional.soft_margin_loss`, with its arguments."""
    return _reduced(-F.logsigmoid(target * input), reduction, size_average, reduce)


def _mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """:func:`torch.nn.functional.mse_loss`, with its arguments."""
    loss = (input - target).square()
    if weight is None:
        return _reduced(loss, reduction, size_average, reduce)
    loss = loss * weight
    return loss.sum() / weight.sum() if reduction == "mean" else _reduced(loss, reduction)


def _reduced(loss: Tensor, reduction: str, size_average: bool | None = None, reduce: bool | None = None) -> Tensor:
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """:func:`torch.cdist`, with its arguments."""
    distances: Tensor = torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)
    return distances


def _pdist(input: Tensor, p: float = 2.0) -> Tensor:
    """:func:`torch.nn.functional.pdist`, with its arguments."""
    one, other = torch.triu_indices(len(input), len(input), 1, device=input.device)
    distances: Tensor = torch.linalg.vector_norm(input[one] - input[other], p, -1)
    return distances


def _linear_cross_entropy(*args: Any, options: object = None, **kwargs: Any) -> Tensor:
    """:func:`torch.nn.functional.linear_cross_entropy`, not in chunks."""
    return F.linear_cross_entropy(*args, **kwargs)


def full(input: Tensor) -> Tensor:
    """The input in float32 at least, as statistics are computed."""
    return input.float() if input.dtype in (torch.float16, torch.bfloat16) else input


#: {operator: the same, computed with elementary ones}
REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.layer_norm: _layer_norm,
    F.hardsigmoid: _hardsigmoid,
    F.huber_loss: _huber_loss,
    F.soft_margin_loss: _soft_margin_loss,
    F.mse_loss: _mse_loss,
    F.pdist: _pdist,
    torch.cdist: _cdist,
}
if hasattr(F, "linear_cross_entropy"):
    REPLACEMENTS[F.linear_cross_entropy] = _linear_cross_entropy
