"""Clipping a gradient by its norm over all parameters, and the transpose of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlo.ops.vectors import add, dot, norm, real, scaled, times

Gradients = Sequence[Tensor | None]
_OFF_ZERO = 1e-6  # as in torch.nn.utils.clip_grad_norm_


def clip(gradients: Gradients, largest: float | None) -> Gradients:
    """The gradients, scaled down together so that their norm is at most ``largest`` (None: as they are)."""
    if largest is None:
        return gradients
    found = [gradient for gradient in gradients if gradient is not None]
    if not found:
        return gradients
    scale = (largest / (_norm(found) + _OFF_ZERO)).clamp(max=1.0)
    # torch cannot differentiate a product of a list and a tensor
    clipped = iter([times(g, scale) for g in found] if scale.requires_grad else scaled(found, scale))
    return [None if gradient is None else next(clipped) for gradient in gradients]


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    """As :func:`mlo.ops.vectors.norm`, but differentiable twice, in forward mode too, if a gradient has a graph.

    The second derivative of torch's norms is NaN where one of the gradients is zero.
    """
    if not any([gradient.requires_grad for gradient in gradients]):
        return norm(gradients)
    square = torch.stack([real(gradient).square().sum() for gradient in gradients]).sum()
    return torch.where(square > 0, square, 1.0).sqrt() * (square > 0)


def transpose_clip(gradients: Gradients, largest: float | None, cotangents: Sequence[Tensor]) -> Sequence[Tensor]:
    """Cotangents of the gradients, from those of the clipped ones.

    A gradient g longer than the largest norm c is scaled by s = c / (|g| + e); a cotangent u of it then becomes
    s (u - g <g, u> / (|g| (|g| + e))).
    """
    own = [gradient for gradient in gradients if gradient is not None]
    if largest is None or not own:
        return cotangents
    given = [c for c, gradient in zip(cotangents, gradients, strict=True) if gradient is not None]
    size = norm(own)
    scale = largest / (size + _OFF_ZERO)
    share = dot(own, given) / (size * (size + _OFF_ZERO)).clamp(min=torch.finfo(size.dtype).tiny)
    share = torch.where(scale <= 1, share, 0.0)  # a shorter gradient stays as it is
    onto = iter(scaled(add(given, scaled(own, share), -1.0), scale.clamp(max=1.0)))
    return [c if gradient is None else next(onto) for c, gradient in zip(cotangents, gradients, strict=True)]
