"""Arithmetic on vectors in parameter space, stored as tuples with one tensor per parameter.

On a GPU the cost of many small tensors is that of the kernel launches. So all tensors are processed at once, by torch's
operators on lists where these exist. They launch one kernel for many tensors only if all tensors at one position
agree in their strides; :func:`aligned` sees to that for gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import repeat, zip_longest
from operator import attrgetter, is_not
from typing import Any, cast

import torch
from torch import Tensor

Vector = tuple[Tensor, ...]


_IS_SPARSE, _IS_THERE = attrgetter("is_sparse"), partial(is_not, None)

TOGETHER = 2**20  # bytes of variables that a step is computed for at once
SMALL = 2**16  # elements; smaller tensors are put together for operators that have no form for lists


def copied(a: Sequence[Tensor]) -> Vector:
    """A copy of the vector, without a graph."""
    if not a or readable(a[0]):
        with torch.no_grad():
            return tuple(map(torch.clone, a))
    copies = tuple([torch.empty_like(tensor) for tensor in a])
    copy_(copies, a)
    return copies


@torch.no_grad()
def copy_(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy the values into the targets, which may have other dtypes and devices."""
    for to, given in _alike(targets, values):
        if to[0].is_complex() or given[0].is_complex():  # of which torch's operators on lists take no conjugate views
            for tensor, value in zip(to, given, strict=True):
                tensor.copy_(value)
        else:
            torch._foreach_copy_(to, given)


@torch.no_grad()
def select_(condition: Tensor, targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy the values into the targets if the condition, a scalar tensor, is True. The host does not wait for it."""
    for to, given in _alike(targets, values):
        small, memory = list[Tensor](), list[tuple[Tensor, Tensor]]()
        for tensor, value in zip(to, given, strict=True):
            plain = not (tensor.is_conj() or value.is_conj())
            if plain and tensor.numel() < SMALL and tensor.stride() == value.stride() and _is_dense(tensor):
                small.append(tensor)
                memory.append((_memory(tensor), _memory(value)))
            else:
                tensor.copy_(torch.where(condition, value, tensor))
        if small:
            old, new = map(torch.cat, zip(*memory, strict=True))
            chosen = torch.where(condition, new, old).split([tensor.numel() for tensor in small])
            torch._foreach_copy_([old for old, _ in memory], chosen)


def _alike(a: Sequence[Tensor], b: Sequence[Tensor]) -> Iterable[tuple[list[Tensor], list[Tensor]]]:
    """The pairs of tensors, gathered by their dtypes and devices."""
    found: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for one, other in zip(a, b, strict=True):
        ones, others = found.setdefault((one.dtype, other.dtype, one.device, other.device), ([], []))
        ones.append(one)
        others.append(other)
    return found.values()


def aligned(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The gradients with the strides of ``like``, as ``.backward()`` has them in ``.grad``.

    A convolution gives its weight's gradient in the layout of its input. Mostly only dimensions of size 1 have other
    strides; then no data is moved.
    """
    return [
        gradient
        if gradient is None or gradient.is_sparse or gradient.stride() == tensor.stride()
        else _with_strides_of(tensor, gradient)
        for gradient, tensor in zip(gradients, like, strict=True)
    ]


def _with_strides_of(like: Tensor, tensor: Tensor) -> Tensor:
    if not _is_dense(like):
        return tensor
    strides = zip(like.shape, like.stride(), tensor.stride(), strict=True)
    if any([size > 1 and one != other for size, one, other in strides]):
        return torch.empty_like(like, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
    return tensor.as_strided(like.shape, like.stride(), tensor.storage_offset())


def _is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's elements fill its memory without gaps, in whatever order."""
    return tensor.layout is torch.strided and bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def _memory(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of its memory."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def readable(tensor: Tensor) -> bool:
    """Whether a value can be read without waiting for a device."""
    return tensor.device.type == "cpu"


def add(a: Sequence[Tensor], b: Sequence[Tensor], scale: float | Tensor = 1.0) -> Vector:
    """``a + scale * b``."""
    if isinstance(scale, Tensor):
        if not readable(scale):
            return torch._foreach_add(list(a), list(scaled(b, scale)))
        scale = float(scale)
    return torch._foreach_add(list(a), list(b), alpha=scale)


def add_(a: Sequence[Tensor], b: Sequence[Tensor], scale: float | Tensor = 1.0) -> None:
    """Add ``scale * b`` to ``a`` in place."""
    if isinstance(scale, Tensor):
        if not readable(scale):
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
    """The inner product, a scalar tensor; a complex number counts as two real ones, as for torch's optimizers."""
    pairs = [(real(x).reshape(-1), real(y).reshape(-1)) for x, y in zip(a, b, strict=True)]
    small = [pair for pair in pairs if len(pair[0]) < SMALL]
    if len(small) > 1:
        pairs = [pair for pair in pairs if len(pair[0]) >= SMALL]
        pairs.append((torch.cat([x for x, _ in small]), torch.cat([y for _, y in small])))
    return torch.stack([torch.dot(x, y) for x, y in pairs]).sum()


def norm(a: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm, a scalar tensor."""
    norms = torch._foreach_norm(list(a))
    return norms[0] if len(norms) == 1 else cast(Tensor, torch.linalg.vector_norm(torch.stack(norms)))


def real(tensor: Tensor) -> Tensor:
    """The tensor, or its real and imaginary parts in one more dimension if it is complex."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def as_like(like: Tensor, numbers: Tensor) -> Tensor:
    """The inverse of :func:`real`, of a tensor of the same kind as ``like``."""
    return torch.view_as_complex(numbers.contiguous()) if like.is_complex() else numbers


def flat(a: Sequence[Tensor]) -> Tensor:
    """All real numbers of the vector as one tensor."""
    return torch.cat([real(tensor).reshape(-1) for tensor in a])


def shaped(numbers: Tensor, like: Sequence[Tensor]) -> Vector:
    """The vector of shapes like ``like`` with these real numbers: the inverse of :func:`flat`."""
    found, pieces = [], numbers.split([tensor.numel() * (2 if tensor.is_complex() else 1) for tensor in like])
    for piece, shape in zip(pieces, like, strict=True):
        found.append(as_like(shape, piece.reshape(real(shape).shape)).to(shape.dtype))
    return tuple(found)


def all_finite(a: Sequence[Tensor]) -> bool:
    """Whether no element is NaN or infinite; the host waits for it."""
    # the norm takes one pass, but the squares of finite elements may overflow
    return not a or bool(torch.isfinite(norm(a))) or all([bool(torch.isfinite(parts(tensor)).all()) for tensor in a])


def dense(a: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The same tensors, none of them sparse, as the gradient of ``nn.Embedding(sparse=True)`` is.

    None is a lazy conjugate either, which the steps of torch's optimizers cannot take.
    """
    if not has_others(a):
        return a
    return [
        tensor if tensor is None else tensor.to_dense() if tensor.is_sparse else tensor.resolve_conj() for tensor in a
    ]


def has_others(a: Sequence[Tensor | None]) -> bool:
    """Whether one of the tensors is sparse, or a lazy conjugate."""
    return any(map(_IS_SPARSE, existing(a))) or any(map(Tensor.is_conj, existing(a)))


def existing(a: Iterable[Tensor | None]) -> Iterator[Tensor]:
    """The tensors among these, without None."""
    return cast(Iterator[Tensor], filter(_IS_THERE, a))


def parts(tensor: Tensor) -> Tensor:
    """The elements of a tensor that are stored: of a sparse one, its values."""
    return tensor._values() if tensor.is_sparse else tensor


def largest(a: Sequence[Tensor]) -> list[Tensor]:
    """The largest magnitude in each tensor, a scalar tensor; NaN if it holds one. Unlike a norm, it cannot overflow."""
    stored = [parts(tensor) if tensor.numel() else tensor.new_zeros(1) for tensor in a]
    if len({tensor.dtype for tensor in stored}) < 2:
        return list(torch._foreach_norm(stored, math.inf)) if stored else []
    found = list(stored)
    for dtype in {tensor.dtype for tensor in stored}:  # torch launches one kernel only for tensors of one kind
        places = [index for index, tensor in enumerate(stored) if tensor.dtype == dtype]
        for place, size in zip(places, torch._foreach_norm([stored[i] for i in places], math.inf), strict=True):
            found[place] = size
    return found


def filled(values: Iterable[Tensor | None], like: Sequence[Tensor]) -> Vector:
    """``values``, with None replaced by zeros of the shapes of ``like``."""
    found = tuple(values)
    if all(map(is_not, found, repeat(None))):
        return cast(Vector, found)
    return tuple([torch.zeros_like(shape) if v is None else v for v, shape in zip(found, like, strict=True)])


def chunks(indices: Sequence[int], of: Sequence[Tensor]) -> Iterator[list[int]]:
    """The indices in parts of about ``TOGETHER`` bytes: what is computed for each part needs a few times its memory."""
    part: list[int] = []
    size = 0
    for index in indices:
        part.append(index)
        size += of[index].numel() * of[index].element_size()
        if size >= TOGETHER:
            yield part
            part, size = [], 0
    if part:
        yield part


def total(one: Vector | None, other: Vector | None) -> Vector | None:
    """The sum of two vectors, where None is zero."""
    return other if one is None else one if other is None else add(one, other)


def difference(one: Sequence[Tensor | None], other: Sequence[Tensor | None], weight: Tensor) -> Sequence[Tensor | None]:
    """(one - other) * weight, where None is zero, and so is what only one of them has."""
    found: list[Tensor | None] = [None] * max(len(one), len(other))
    both, ones, others = list[int](), list[Tensor](), list[Tensor]()
    for index, (a, b) in enumerate(zip_longest(one, other)):
        if a is not None and b is not None:
            both.append(index)
            ones.append(a)
            others.append(b)
        elif a is not None:
            found[index] = times(a, weight)
        elif b is not None:
            found[index] = times(-b, weight)
    if both:
        for index, tensor in zip(both, scaled(torch._foreach_sub(ones, others), weight), strict=True):
            found[index] = tensor
    return found
