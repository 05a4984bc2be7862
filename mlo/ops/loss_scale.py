"""The adaptive loss scale for float16, in which small gradients would otherwise underflow to zero."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from mlo.ops.vectors import all_finite

GROWTH_INTERVAL = 2000  # passes without an overflow after which the scale is doubled, as in torch's GradScaler
LEAST = 2.0**-16


@dataclass
class LossScale:
    """The factor by which a loss is multiplied before its gradient is computed, and the gradient divided afterwards.

    Attributes:
        value: a power of two. Halved when a gradient overflows; doubled after 2000 passes without an overflow.
        passes: number of passes since ``value`` last changed.
    """

    value: float = 2.0**16
    passes: int = 0

    def accepts(self, gradients: Iterable[Tensor]) -> bool:
        """Whether the gradients can be used. If they overflow, halves the scale: compute them again with it.

        Synchronizes with the device. At the smallest scale it accepts all gradients: a smaller one would not help.
        """
        found = list(gradients)
        if self.value > LEAST and found and not all_finite(found):
            self.value, self.passes = self.value / 2, 0
            return False
        self.passes += 1
        if self.passes == GROWTH_INTERVAL:
            self.value, self.passes = self.value * 2, 0
        return True
