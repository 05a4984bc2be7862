"""Two levels, and pairs of engines on them: one takes its rounds as usual, the other captures them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import mlo


class Fit(mlo.Problem):
    factor = 1.0

    def loss(self, batch: Any, top: mlo.Problem) -> Tensor:
        x, y = batch
        return self.factor * (self(x) - y).square().mean() + top.params["weight"].exp().mean() * self(x).square().mean()


class Judge(mlo.Problem):
    def loss(self, batch: Any, low: mlo.Problem) -> Tensor:
        x, y = batch
        return (low(x) - y).square().mean() + self.params["weight"].square().mean()


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()


def levels(cls: type[Fit] = Fit, rate: float = 0.1, last: int = 6, **low: Any) -> list[mlo.Problem]:
    torch.manual_seed(0)
    model, top = network(), nn.Linear(1, 2).double()
    sizes = [6, 6, 6, 6, 6, 6, last]
    data = [(torch.randn(n, 3).double(), torch.randn(n, 2).double()) for n in sizes]
    sgd = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 30)
    above = torch.optim.SGD(top.parameters(), 0.05, momentum=0.5)
    return [
        cls("low", module=model, optimizer=sgd, scheduler=scheduler, data=data, **low),
        Judge("top", module=top, optimizer=above, data=[(x.clone(), y) for x, y in data[::-1]]),
    ]


class Noisy(Fit):
    """Draws before and after what it reads."""

    def loss(self, batch: Any, top: mlo.Problem) -> Tensor:
        x, y = batch
        found = super().loss((x + 0.1 * torch.randn_like(x), F.dropout(y, 0.3)), top)
        return found + 0.1 * F.dropout(top.params["weight"], 0.5).square().mean()


class NoisyJudge(Judge):
    def loss(self, batch: Any, low: mlo.Problem) -> Tensor:
        x, y = batch
        return super().loss((x + 0.1 * torch.randn_like(x), y), low)


class Checkpointed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def noisy_levels(last: type[nn.Sequential] = nn.Sequential, **low: Any) -> list[mlo.Problem]:
    low, top = levels(Noisy, **low)
    module = nn.Sequential(*low.module[:2], last(nn.Dropout(0.4), *low.module[2:]))
    sgd = SGD(module.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    data = [low.stream.peek(i) for i in range(7)]
    options = {"steps": low.steps, "clip_norm": low.clip_norm, "accumulate": low.accumulate}
    return [
        Noisy("low", module=module, optimizer=sgd, data=data, **options),
        NoisyJudge("top", module=top.module, optimizer=top.optimizer, data=data[::-1]),
    ]


def engines(
    make: Callable[[], list[mlo.Problem]], *args: Any, device: str = "cpu", **kwargs: Any
) -> tuple[mlo.Engine, mlo.Engine]:
    plain, captured = (mlo.Engine(make(), *args, capture=c, device=device, **kwargs) for c in (False, True))
    return plain, captured


WARM_CG = {"kind": "cg", "iterations": 2, "warm_start": True, "tolerance": 0.0}


def run_both(plain: mlo.Engine, captured: mlo.Engine, rounds: int = 6) -> None:
    plain.run(rounds)
    captured.run(rounds)
