"""Arithmetic on vectors that are kept as tuples of tensors, one per parameter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

Vector = tuple[Tensor, ...]


def copied(a: Sequence[Tensor]) -> Vector:
    """The same values in memory of their own."""
    return tuple(tensor.clone() for tensor in a)


def add(a: Sequence[Tensor], b: Sequence[Tensor], scale: float | Tensor = 1.0) -> Vector:
    """``a + scale * b``."""
    if isinstance(scale, Tensor):
        if scale.device.type == "cuda":  # reading it would wait for the card
            return torch._foreach_add(list(a), list(scaled(b, scale)))
        scale = float(scale)
    return torch._foreach_add(list(a), list(b), alpha=scale)


def add_(a: Sequence[Tensor], b: Sequence[Tensor], scale: float | Tensor = 1.0) -> None:
    """Add ``scale * b`` to ``a`` in its own memory."""
    if isinstance(scale, Tensor):
        if scale.device.type == "cuda":  # reading it would wait for the card
            torch._foreach_add_(list(a), list(scaled(b, scale)))
            return
        scale = float(scale)
    torch._foreach_add_(list(a), list(b), alpha=scale)


def scaled(a: Sequence[Tensor], scale: float | Tensor) -> Vector:
    """``scale * a``."""
    return torch._foreach_mul(list(a), cast(float, scale)) if a else ()  # a scalar tensor will do as well


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The inner product, a scalar tensor."""
    return torch.stack([torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(a, b, strict=True)]).sum()


def norm(a: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm, a scalar tensor."""
    size: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(a))))
    return size


def filled(values: Iterable[Tensor | None], like: Sequence[Tensor]) -> Vector:
    """``values`` with zeros of the shapes of ``like`` where there is none."""
    return tuple(torch.zeros_like(shape) if v is None else v for v, shape in zip(values, like, strict=True))
