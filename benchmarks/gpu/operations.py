"""What an operation costs on a GPU: kernel launches, floating-point operations, bytes.

Assumptions, which hold for torch's CUDA operators in most cases:

- A view, and an operation that only makes an uninitialized tensor, launches nothing. Everything else launches one
  kernel: a convolution too, and each gradient of a convolution that is asked for.
- An operation on lists of tensors (``torch._foreach_*``) launches a kernel for as many tensors as fit into one: up to
  110, 64, 48, 36 or 30 (of 1 to 5 lists, the result included), and up to 320 chunks of 65,536 elements. If the tensors
  at one position differ in their strides, or one has gaps, torch takes one kernel for each position. ``_foreach_norm``
  takes two more, for zeros and for the sums over chunks.
- ``cat`` and ``stack`` launch a kernel for each 128 tensors.
- A kernel reads its inputs once and writes its results once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.shapes import tensors_in

CHUNK, MOST_CHUNKS, MOST_TENSORS = 65_536, 320, (110, 64, 48, 36, 30)
AT_ONCE_IN_CAT = 128
_FREE = frozenset(
    (
        "_unsafe_view",
        "alias",
        "detach",
        "empty",
        "empty_like",
        "empty_permuted",
        "empty_strided",
        "lift_fresh",
        "new_empty",
        "new_empty_strided",
        "resize_",
        "set_",
    )
)


def name_of(operator: Any) -> str:
    """The operator's name without namespace and overload."""
    return str(operator.overloadpacket.__name__)


def launches(operator: Any, args: Sequence[Any], result: Any) -> int:
    """The number of kernels that a call of an operator launches."""
    name = name_of(operator)
    if operator.is_view or operator.namespace == "prim" or name in _FREE:
        return 0
    if name.startswith("_foreach_"):
        return _of_lists(name, args, result)
    if name == "convolution_backward":
        return sum(args[-1])
    if name in ("cat", "stack"):
        return -(-len(args[0]) // AT_ONCE_IN_CAT)
    return 1


def flop(operator: Any, args: Sequence[Any], result: Any) -> int:
    """Floating-point operations of convolutions and matrix products: two for each multiplication and addition."""
    name = name_of(operator)
    if name == "convolution":
        return 2 * result.numel() * prod(args[1].shape[1:])
    if name == "convolution_backward":
        return 2 * args[0].numel() * prod(args[2].shape[1:]) * sum(args[-1][:2])
    if name in ("mm", "bmm"):
        return 2 * args[0].numel() * args[1].shape[-1]
    if name == "addmm":
        return 2 * args[1].numel() * args[2].shape[-1]
    return 0


def moved_bytes(given: Sequence[Tensor], result: Any) -> int:
    """Bytes of all inputs and results, each counted once."""
    return sum(map(_bytes, {id(t): t for t in given}.values())) + sum(map(_bytes, tensors_in(result)))


def _bytes(tensor: Tensor) -> int:
    """Of the elements that the tensor has in memory: an expanded or overlapping one has fewer than its shape says."""
    if not tensor.numel():
        return 0
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.element_size() * min(tensor.numel(), span)


def _of_lists(name: str, args: Sequence[Any], result: Any) -> int:
    lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
    if result and not name.endswith("_") and name != "_foreach_norm":
        lists.append(result)
    together = all(map(_alike, zip(*lists, strict=True))) and len({t.dtype for of in lists for t in of}) == 1
    count = sum(1 for _ in _chunked(lists[0], MOST_TENSORS[len(lists) - 1])) if together else len(lists[0])
    return count + 2 if name == "_foreach_norm" and together else count


def _alike(tensors: Sequence[Tensor]) -> bool:
    """Whether one kernel can go through the memory of all these tensors in the same order."""
    return len({t.stride() for t in tensors}) == 1 and all(map(torch.ops.aten.is_non_overlapping_and_dense, tensors))


def _chunked(tensors: Sequence[Tensor], most: int) -> Iterator[tuple[int, int]]:
    """The (tensors, chunks) of each kernel, as torch's multi_tensor_apply fills them."""
    held = chunks = 0
    for tensor in tensors:
        left = -(-tensor.numel() // CHUNK)
        held += left > 0
        while left:
            taken = min(left, MOST_CHUNKS - chunks)
            left, chunks = left - taken, chunks + taken
            if chunks == MOST_CHUNKS or (held == most and not left):
                yield held, chunks
                held, chunks = int(left > 0), 0
    if chunks:
        yield held, chunks
