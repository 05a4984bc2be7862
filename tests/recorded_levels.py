"""Two levels, and pairs of engines on them: one takes its rounds as usual, the other captures them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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


def engines(make: Callable[[], list[mlo.Problem]], *args: Any, **kwargs: Any) -> tuple[mlo.Engine, mlo.Engine]:
    plain, captured = (mlo.Engine(make(), *args, capture=c, device="cpu", **kwargs) for c in (False, True))
    return plain, captured


WARM_CG = {"kind": "cg", "iterations": 2, "warm_start": True, "tolerance": 0.0}


def run_both(plain: mlo.Engine, captured: mlo.Engine, rounds: int = 6) -> None:
    plain.run(rounds)
    captured.run(rounds)
