"""Which tensors are written into, and their values from before."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from mlo.ops.vectors import readable

VERSION = attrgetter("_version")  # torch's count of the writes into a tensor


class Values:
    """Copies of tensors, to put back what is written into them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, self._versions = tensors, [*map(VERSION, tensors)]
        self._values = [tensor.detach().clone() for tensor in tensors]

    def put_back(self) -> list[bool]:
        """Which tensors were written into, and now have their values again.

        What is written through ``.data``, torch does not count. It is found by the values on a CPU only: elsewhere
        that would wait for the device.
        """
        written = []
        for tensor, value, version in zip(self._tensors, self._values, self._versions, strict=True):
            counted = tensor._version != version
            differs = counted or (readable(tensor) and not _equal(tensor, value))
            if differs:
                with torch.no_grad():
                    tensor.copy_(value)
            written.append(differs)
        return written


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether all numbers are the same; NaN is the same as NaN."""
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())
