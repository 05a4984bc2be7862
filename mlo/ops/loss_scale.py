"""Loss scales for float16, in which small gradients would vanish."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mlo.ops.vectors import norm

GROWTH_INTERVAL = 2000  # passes without an overflow after which the scale is doubled, as torch's GradScaler has it
LEAST = 2.0**-16


@dataclass
class LossScale:
    """What a loss is multiplied by before its gradient is taken, and the gradient divided by after.

    Attributes:
        value: a power of two; halved where a gradient overflows, doubled after many that do not.
        passes: taken since it last changed.
    """

    value: float = 2.0**16
    passes: int = 0

    def accepts(self, gradients: Iterable[Tensor]) -> bool:
        """Whether the pass may stand; if not, the scale is now smaller, and the pass is to be taken again.

        It waits for the device. At the least scale every pass stands: what is not finite then is no matter of scale.
        """
        found = list(gradients)
        if self.value > LEAST and found and not bool(torch.isfinite(norm(found))):
            self.value, self.passes = self.value / 2, 0
            return False
        self.passes += 1
        if self.passes == GROWTH_INTERVAL:
            self.value, self.passes = self.value * 2, 0
        return True
