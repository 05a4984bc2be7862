"""Counts what a round of Learning by Teaching would launch on a GPU, by cause, on tensors without data.

The engine takes the code that it takes on a GPU (:mod:`benchmarks.gpu.pretended`), so a count also proves that a round
never waits for the GPU: at the first read of a value on the host it raises a :class:`HostReadError`::

    found = count_round()
    print(found.table())
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mlo
from benchmarks.gpu.causes import TRANSFERS, cause, line
from benchmarks.gpu.operations import flop, launches, moved_bytes, name_of
from benchmarks.gpu.pretended import META, HostReadError, pretended_gpu
from benchmarks.gpu.shapes import KnownShapes, tensors_in
from benchmarks.lbt_step import make_task, problems, resnet18

_SHAPES = KnownShapes()
_READS = frozenset(("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero"))


class Counting(TorchDispatchMode):
    """A context that counts the operations on tensors of a pretended GPU.

    Attributes:
        by_cause: {cause: kernel launches}.
        by_function: {(cause, "file:function"): kernel launches}, of the innermost function that belongs to a cause.
        by_operator: {operator: kernel launches}.
        flop: floating-point operations of convolutions and matrix products.
        bytes: read and written by all kernels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_cause: Counter[str] = Counter()
        self.by_function: Counter[tuple[str, str]] = Counter()
        self.by_operator: Counter[str] = Counter()
        self.flop = self.bytes = 0

    @property
    def launches(self) -> int:
        """The number of kernel launches."""
        return self.by_cause.total()

    def __torch_dispatch__(
        self, operator: Any, _: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See :class:`torch.utils._python_dispatch.TorchDispatchMode`."""
        options = kwargs or {}
        given = [*tensors_in(args, [*options.values()])]
        on_gpu = any([t.is_meta for t in given])
        name = name_of(operator)
        if on_gpu and (name in _READS or _has_mask(name, args)):
            raise HostReadError(f"aten::{name} reads a value of the GPU on the host, at {line(sys._getframe(1))}")
        if on_gpu and _leaves(name, args, options):
            if not options.get("non_blocking") and not (name == "copy_" and len(args) > 2 and args[2]):
                raise HostReadError(f"a blocking copy to the host, at {line(sys._getframe(1))}")
            self._note(TRANSFERS, line(sys._getframe(1)), "copy to the host", 1)
            return args[0] if name == "copy_" else torch.empty_like(args[0], device="cpu")
        result = _SHAPES.run(operator, args, options) if on_gpu else operator(*args, **options)
        if on_gpu or any([t.is_meta for t in tensors_in(result)]):
            count = launches(operator, args, result)
            if count:
                of, function = cause(sys._getframe(1))
                arrives = name in ("_to_copy", "copy_") and not all([t.is_meta for t in given])
                self._note(TRANSFERS if arrives else of, function, name, count)
                self.flop += flop(operator, args, result)
                self.bytes += moved_bytes(given, result)
        return result

    def _note(self, of: str, function: str, operator: str, count: int) -> None:
        self.by_cause[of] += count
        self.by_function[of, function] += count
        self.by_operator[operator] += count

    def table(self, most: int = 12) -> str:
        """The counts as lines of text: by cause, and the ``most`` frequent lines and operators."""
        rows = [f"{self.launches} launches, {self.flop / 1e12:.2f} TFLOP, {self.bytes / 1e9:.0f} GB"]
        rows += [f"{count:8} {of}" for of, count in self.by_cause.most_common()]
        rows += ["by function:"] + [
            f"{n:8} {of}: {function}" for (of, function), n in self.by_function.most_common(most)
        ]
        rows += ["by operator:"] + [f"{count:8} {name}" for name, count in self.by_operator.most_common(most)]
        return "\n".join(rows)


def count_round(
    student: Callable[[], nn.Module] = resnet18,
    *,
    channels: int = 16,
    cells: int = 8,
    batch: int = 64,
    size: int = 32,
    hypergradient: object = "darts",
    clip_norm: float | None = 5.0,
    rounds_before: int = 1,
) -> Counting:
    """Count one round of Learning by Teaching; by default at the paper's size.

    Args:
        student: makes the student.
        channels, cells: of the supernet.
        batch, size: images in a batch, and their height and width.
        hypergradient: see :class:`mlo.Engine`.
        clip_norm: of teacher and student.
        rounds_before: rounds that are not counted: in the first one, optimizers make their states.

    Raises:
        HostReadError: if a round reads a value of the GPU on the host.
    """
    with META:
        task = make_task(student, channels=channels, cells=cells, batch=batch, size=size)
    levels = problems(task, held=())
    for network in levels[:2]:
        network.clip_norm = clip_norm
    with pretended_gpu():
        return count_step(mlo.Engine(levels, hypergradient, device="cuda").step, rounds_before)


def count_step(step: Callable[[], object], before: int = 1) -> Counting:
    """Count one call of a step, after ``before`` calls that are not counted but may not read on the host either.

    Call it inside :func:`benchmarks.gpu.pretended.pretended_gpu`.
    """
    for _ in range(before):
        with Counting():
            step()
    with Counting() as found:
        step()
    return found


def _has_mask(name: str, args: Sequence[Any]) -> bool:
    """Whether it is an indexing whose result has as many elements as a mask has ones."""
    if name != "index":
        return False
    return any([isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in args[1]])


def _leaves(name: str, args: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Whether it copies a tensor of the GPU to the host."""
    if name == "copy_":
        return bool(args[1].is_meta and not args[0].is_meta)
    device = options.get("device")
    return name == "_to_copy" and device is not None and torch.device(device).type == "cpu"
