"""Two levels in float64, trained by an engine, and by the loop that a person would write by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import mlo

Made = tuple[nn.Module, torch.optim.Optimizer]


class Factors(nn.Module):
    """Two positive factors of the lower loss."""

    def __init__(self) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.tensor([-0.3, 0.4], dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.logs.exp()


class Fit(mlo.Problem):
    def loss(self, batch, factors):
        return inner(self(batch[0]), batch[1], self.params["weight"], factors())


class Judge(mlo.Problem):
    def loss(self, batch, model):
        return (model(batch[0]) - batch[1]).square().mean()


class Low(mlo.Problem):
    """The lowest of three levels, whose middle one has an inner path."""

    def loss(self, batch, middle):
        return (self(batch) - middle(batch)).square().mean()


class Middle(mlo.Problem):
    def loss(self, batch, low, top):
        return (low(batch).sin() - top(batch)).square().mean()


class Top(mlo.Problem):
    def loss(self, batch, middle):
        return middle(batch).cos().square().mean()


def inner(output: Tensor, target: Tensor, weight: Tensor, factors: Tensor) -> Tensor:
    return factors[0] * (output - target).square().mean() + factors[1] * weight.square().sum()


def batches(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    sizes = ((8, 4), (8, 1))
    return [tuple(torch.randn(*s, generator=draw, dtype=torch.float64) for s in sizes) for _ in range(count)]


def linear() -> nn.Linear:
    module = nn.Linear(4, 1).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[0.9, -0.4, 0.2, -1.1]]))
        module.bias.fill_(0.3)
    return module


def engine(
    make: Callable[[], Made], estimator: object, steps: int = 3, top_rate: float = 0.0, **options: Any
) -> mlo.Engine:
    module, optimizer = make()
    top = Factors()
    fit = Fit("model", module=module, optimizer=optimizer, data=batches(steps), steps=steps, **options)
    judge = Judge(
        "factors", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=top_rate), data=batches(1, seed=1)
    )
    return mlo.Engine([fit, judge], estimator, device="cpu")


def trained(make: Callable[[], Made], logs: Tensor, steps: Iterable[Any], clip: float | None = None) -> nn.Module:
    module, optimizer = make()
    for x, y in steps:
        optimizer.zero_grad()
        inner(module(x), y, module.weight, logs.exp()).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
    return module


def derivative(make: Callable[[], Made], steps: int = 3, clip: float | None = None) -> Tensor:
    """The derivative of the upper loss after that loop, by differences of fourth order."""
    data, (x, y), logs, h = batches(steps), batches(1, seed=1)[0], Factors().logs.detach(), 1e-3

    def upper(at: Tensor) -> Tensor:
        with torch.enable_grad():
            module = trained(make, at, data, clip)
        return (module(x).detach() - y).square().mean()

    found = []
    for along in torch.eye(2, dtype=torch.float64):
        one, two = (upper(logs + k * h * along) - upper(logs - k * h * along) for k in (1, 2))
        found.append((8 * one - two) / (12 * h))
    return torch.stack(found)


def values(tensors: Sequence[Tensor] | Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]
