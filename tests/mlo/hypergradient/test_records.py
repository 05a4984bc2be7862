"""Records of steps while what they read is stepped on: several tops differentiate one step, one after another."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import mlo

RATE = 0.1


class Vector(nn.Module):
    def __init__(self, *value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.value


class Low(mlo.Problem):
    """Quadratic in its own variables, so that differences of its gradient are exact."""

    def loss(self, batch, one, two):
        return (self() - one().exp()).square().sum() + (self() * two().sin()).sum()


class Top(mlo.Problem):
    def loss(self, batch, low):
        return low().square().sum()


@pytest.mark.parametrize("product", ["exact", "forward", "central", "one_sided"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, partial(torch.optim.Adam, eps=1.0)], ids=["sgd", "adam"])
def test_each_top_is_differentiated_at_what_the_step_had_read(product, optimizer):
    low, one, two = Vector(0.3, -0.7), Vector(0.5, 0.2), Vector(-0.4, 0.9)
    problems = [Low("low", module=low, optimizer=optimizer(low.parameters(), lr=RATE))]
    for name, module in (("one", one), ("two", two)):
        problems.append(Top(name, module=module, optimizer=torch.optim.SGD(module.parameters(), lr=RATE)))
    engine = mlo.Engine(problems, {"kind": "one_step", "product": product}, lookahead=False, device="cpu")
    start, x, y = (p.module.value.detach().clone().requires_grad_() for p in problems)
    gradient = 2 * (start - x.exp()) + y.sin()
    moved = start - RATE * (gradient if optimizer is torch.optim.SGD else gradient / (gradient.abs() + 1.0))
    expected = torch.autograd.grad(moved.square().sum(), (x, y))
    engine.step()
    torch.testing.assert_close(low.value.detach(), moved.detach())
    torch.testing.assert_close(one.value.detach(), (x - RATE * expected[0]).detach(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(two.value.detach(), (y - RATE * expected[1]).detach(), rtol=1e-7, atol=1e-9)


class Stray(mlo.Problem):
    """Uses its module's own variables next to the substituted ones."""

    def loss(self, batch, top):
        return (self() * self.module.value * top()).sum()


@pytest.mark.filterwarnings("ignore:problem 'low'")
def test_what_a_loss_takes_from_its_module_is_constant_in_virtual_steps_too():
    low, top = Vector(0.3, -0.7), Vector(0.5, 0.2)
    problems = [
        Stray("low", module=low, optimizer=torch.optim.SGD(low.parameters(), lr=RATE)),
        Top("top", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=RATE)),
    ]
    engine = mlo.Engine(problems, "one_step", device="cpu")
    found = engine.hypergradient("top")["value"]
    value, weight = low.value.detach(), top.value.detach()
    torch.testing.assert_close(found, 2 * (value - RATE * value * weight) * -RATE * value)
