"""Clipping a gradient by its norm over all parameters, and the transpose of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mlo.ops.vectors import add, dot, norm, scaled

Gradients = Mapping[str, Tensor | None]
_OFF_ZERO = 1e-6  # as in torch.nn.utils.clip_grad_norm_


def clip(gradients: Gradients, largest: float | None) -> Gradients:
    """The gradients, scaled down together so that their norm is at most ``largest`` (None: as they are)."""
    found = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    if largest is None or not found:
        return gradients
    scale = (largest / (norm([*found.values()]) + _OFF_ZERO)).clamp(max=1.0)
    # torch cannot differentiate a product of a list and a tensor
    clipped = [g * scale for g in found.values()] if scale.requires_grad else scaled([*found.values()], scale)
    return {**gradients, **dict(zip(found, clipped, strict=True))}


def transpose_clip(gradients: Gradients, largest: float | None, cotangents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cotangents of the gradients, from those of the clipped ones.

    A gradient g longer than the largest norm c is scaled by s = c / (|g| + e); a cotangent u of it then becomes
    s (u - g <g, u> / (|g| (|g| + e))).
    """
    found = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    if largest is None or not found:
        return dict(cotangents)
    own, given = [*found.values()], [cotangents[name] for name in found]
    size = norm(own)
    scale = largest / (size + _OFF_ZERO)
    share = dot(own, given) / (size * (size + _OFF_ZERO)).clamp(min=torch.finfo(size.dtype).tiny)
    share = torch.where(scale <= 1, share, 0.0)  # a shorter gradient stays as it is
    onto = scaled(add(given, scaled(own, share), -1.0), scale.clamp(max=1.0))
    return {**cotangents, **dict(zip(found, onto, strict=True))}
