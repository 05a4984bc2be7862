"""Two levels of layers, the lower one following the upper, and an attention module that can replace a layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlo


class Following(mlo.Problem):
    def loss(self, batch, top):
        return (self(batch) - top(batch)).square().mean()


class Judging(mlo.Problem):
    def loss(self, batch, low):
        return low(batch).sin().square().mean()


class Attention(nn.Module):
    """One head over the rows of a batch; the fused kernels of this operator have no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(3, 12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.mix(x)[None, None].chunk(3, dim=-1)
        return self.head(F.scaled_dot_product_attention(query, key, value))[0, 0]


class Value(nn.Module):
    """A module that is its only parameter, in float64."""

    def __init__(self, *value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.value
