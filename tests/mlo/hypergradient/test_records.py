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


class Scale(Vector):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.value


class Reading(mlo.Problem):
    """Reads the top in every way: on its own output, on the batch, by parameter, and as a constant."""

    def loss(self, batch, top):
        with torch.no_grad():
            constant = top.params["value"] + top(batch)
        scaled = (top(self()) - 1).square() / 2
        return (scaled + self() * (top(batch) + top.params["value"].square() + constant)).sum()


class Other(mlo.Problem):
    def loss(self, batch, low):
        return low().square().sum()


@pytest.mark.parametrize("product", ["exact", "forward", "central", {"kind": "one_sided", "radius": 1e-6}], ids=str)
@pytest.mark.parametrize("kind", ["one_step", "cg"])
def test_all_ways_to_read_a_problem(kind, product):
    low, top = Vector(0.3, -0.7), Scale(0.5, 0.2)
    batches = [torch.tensor(each, dtype=torch.float64) for each in ((2.0, 3.0), (-1.0, 0.5))]
    problems = [
        Reading("low", module=low, optimizer=torch.optim.SGD(low.parameters(), lr=RATE), data=batches),
        Other("top", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=RATE)),
    ]
    options = {} if kind == "one_step" else {"fresh_batch": True}
    engine = mlo.Engine(problems, {"kind": kind, "product": product, **options}, lookahead=False, device="cpu")
    for _ in range(2):
        start, x = (p.module.value.detach().clone().requires_grad_() for p in problems)

        def gradient(at: Tensor, x: Tensor, batch: Tensor) -> Tensor:
            constant = x.detach() * (1 + batch)
            return x * (x * at - 1) + batch * x + x.square() + constant

        moved = (start - RATE * gradient(start, x, batches[0])).detach()
        if kind == "one_step":
            (cross,) = torch.autograd.grad(gradient(start, x, batches[0]), x, 2 * moved)
            expected = -RATE * cross
        else:  # the curvature is that of x^2 at^2 / 2, on the next batch
            (cross,) = torch.autograd.grad(gradient(moved, x, batches[1]), x, 2 * moved / x.detach().square())
            expected = -cross
        engine.step()
        torch.testing.assert_close(low.value.detach(), moved)
        torch.testing.assert_close(top.value.detach(), (x - RATE * expected).detach(), rtol=1e-6, atol=0)
        batches.reverse()
        engine.problems["low"].stream._index = 0
        engine.problems["low"].stream._data = batches


class Constant(mlo.Problem):
    def loss(self, batch, top):
        with torch.no_grad():
            constant = top()
        return (self() * (constant + top().square())).sum()


def test_what_is_read_without_gradients_is_constant():
    low, top = Vector(0.3, -0.7), Vector(0.5, 0.2)
    problems = [
        Constant("low", module=low, optimizer=torch.optim.SGD(low.parameters(), lr=RATE)),
        Other("top", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=RATE)),
    ]
    engine = mlo.Engine(problems, "one_step", device="cpu")
    value, x = low.value.detach(), top.value.detach()
    stepped = value - RATE * (x + x.square())
    torch.testing.assert_close(engine.hypergradient("top")["value"], 2 * stepped * -RATE * 2 * x)
