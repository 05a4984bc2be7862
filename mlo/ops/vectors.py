"""Arithmetic on vectors in parameter space, stored as tuples with one tensor per parameter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import is_not
from typing import cast

import torch
from torch import Tensor

Vector = tuple[Tensor, ...]


def copied(a: Sequence[Tensor]) -> Vector:
    """A copy of the vector."""
    return tuple(tensor.clone() for tensor in a)


def add(a: Sequence[Tensor], b: Sequence[Tensor], scale: float | Tensor = 1.0) -> Vector:
    """``a + scale * b``."""
    if isinstance(scale, Tensor):
        if scale.device.type == "cuda":  # float(scale) would synchronize with the GPU
            return torch._foreach_add(list(a), list(scaled(b, scale)))
        scale = float(scale)
    return torch._foreach_add(list(a), list(b), alpha=scale)


def add_(a: Sequence[Tensor], b: Sequence[Tensor], scale: float | Tensor = 1.0) -> None:
    """Add ``scale * b`` to ``a`` in place."""
    if isinstance(scale, Tensor):
        if scale.device.type == "cuda":  # float(scale) would synchronize with the GPU
            torch._foreach_add_(list(a), list(scaled(b, scale)))
            return
        scale = float(scale)
    torch._foreach_add_(list(a), list(b), alpha=scale)


def scaled(a: Sequence[Tensor], scale: float | Tensor) -> Vector:
    """``scale * a``, where each tensor keeps its dtype."""
    if isinstance(scale, Tensor) and any([tensor.dtype != scale.dtype for tensor in a]):
        return tuple([times(tensor, scale) for tensor in a])
    return torch._foreach_mul(list(a), cast(float, scale)) if a else ()  # scalar tensors are accepted too


def times(tensor: Tensor, scale: Tensor) -> Tensor:
    """``scale * tensor`` in the tensor's dtype, which torch keeps only where the tensor has a dimension."""
    return tensor * scale.to(tensor.dtype)


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The inner product, a scalar tensor."""
    return torch.stack([torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(a, b, strict=True)]).sum()


def norm(a: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm, a scalar tensor."""
    norms = torch._foreach_norm(list(a))
    return norms[0] if len(norms) == 1 else cast(Tensor, torch.linalg.vector_norm(torch.stack(norms)))


def filled(values: Iterable[Tensor | None], like: Sequence[Tensor]) -> Vector:
    """``values``, with None replaced by zeros of the shapes of ``like``."""
    found = tuple(values)
    if all(map(is_not, found, repeat(None))):
        return cast(Vector, found)
    return tuple([torch.zeros_like(shape) if v is None else v for v, shape in zip(found, like, strict=True)])


def total(one: Vector | None, other: Vector | None) -> Vector | None:
    """The sum of two vectors, where None is zero."""
    return other if one is None else one if other is None else add(one, other)


def difference(one: Tensor | None, other: Tensor | None, weight: Tensor) -> Tensor | None:
    """(one - other) * weight, where None is zero."""
    if one is None:
        return None if other is None else times(-other, weight)
    return times(one if other is None else one - other, weight)
