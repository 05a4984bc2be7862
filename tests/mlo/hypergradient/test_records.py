"""Records of steps while what they read is stepped on: several tops differentiate one step, one after another."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from two_levels import Value

import mlo
from mlo.hypergradient import Exact
from mlo.levels.state import State, copied
from mlo.training import round

RATE = 0.1


class Low(mlo.Problem):
    """Quadratic in its own variables, so that differences of its gradient are exact."""

    def loss(self, batch, one, two):
        return (self() - one().exp()).square().sum() + (self() * one() * two().sin()).sum()


class Top(mlo.Problem):
    def loss(self, batch, low):
        return low().square().sum()


@pytest.mark.parametrize("product", ["exact", "forward", "central", "one_sided"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, partial(torch.optim.Adam, eps=1.0)], ids=["sgd", "adam"])
def test_each_top_is_differentiated_at_what_the_step_had_read(product, optimizer):
    low, one, two = Value(0.3, -0.7), Value(0.5, 0.2), Value(-0.4, 0.9)
    problems = [Low("low", module=low, optimizer=optimizer(low.parameters(), lr=RATE))]
    for name, module in (("one", one), ("two", two)):
        problems.append(Top(name, module=module, optimizer=torch.optim.SGD(module.parameters(), lr=RATE)))
    engine = mlo.Engine(problems, {"kind": "one_step", "product": product}, lookahead=False, device="cpu")
    start, x, y = (p.module.value.detach().clone().requires_grad_() for p in problems)
    gradient = 2 * (start - x.exp()) + x * y.sin()
    moved = start - RATE * (gradient if optimizer is torch.optim.SGD else gradient / (gradient.abs() + 1.0))
    expected = torch.autograd.grad(moved.square().sum(), (x, y))
    engine.step()
    torch.testing.assert_close(low.value.detach(), moved.detach())
    torch.testing.assert_close(one.value.detach(), (x - RATE * expected[0]).detach(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(two.value.detach(), (y - RATE * expected[1]).detach(), rtol=1e-7, atol=1e-9)


class LowOverBase(mlo.Problem):
    def loss(self, batch, base, one, two):
        return (self() * base() * one() * two()).sum()


class Base(mlo.Problem):
    def loss(self, batch):
        return self().square().sum()


def test_only_what_changes_before_a_step_is_differentiated_is_copied(monkeypatch):
    """The first top: the base has stepped before, and the second top steps when all is done."""
    copies: list[State] = []
    monkeypatch.setattr(round, "copied", lambda state: (copies.append(state), copied(state))[1])
    problems = []
    for cls, name in ((Base, "base"), (LowOverBase, "low"), (Top, "one"), (Top, "two")):
        module = Value(0.3, -0.7)
        problems.append(cls(name, module=module, optimizer=torch.optim.SGD(module.parameters(), lr=RATE)))
    mlo.Engine(problems, "one_step", lookahead=False, device="cpu").step()
    assert [state.variables[0] is problems[2].module.value for state in copies] == [True]


class Bent(mlo.Problem):
    def loss(self, batch, top):
        return (self() * top().square()).sum()


@pytest.mark.parametrize("product", ["exact", "forward", "central", "one_sided"])
def test_every_step_of_a_top_is_differentiated_at_what_the_lower_step_had_read(product):
    low, top = Value(0.3, -0.7), Value(0.5, 0.2)
    problems = [
        Bent("low", module=low, optimizer=torch.optim.SGD(low.parameters(), lr=RATE)),
        Top("top", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=RATE), steps=3),
    ]
    value, x = low.value.detach().clone(), top.value.detach().clone()
    engine = mlo.Engine(problems, {"kind": "one_step", "product": product}, lookahead=False, device="cpu")
    engine.step()
    hypergradient = 2 * (value - RATE * x.square()) * -RATE * 2 * x
    torch.testing.assert_close(top.value.detach(), x - 3 * RATE * hypergradient, rtol=1e-7, atol=0)


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.tensor([0.3, -0.7], dtype=torch.float64))
        self.two = nn.Parameter(torch.tensor([0.8, 0.6], dtype=torch.float64))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.one, self.two


class HalfSteps(mlo.Problem):
    """Reaches its second variable at even steps only."""

    def loss(self, batch, top):
        one, two = self()
        loss = (one.square() * top()).sum()
        return loss if self.steps_taken % 2 else loss + (two.square() * top()).sum()


class Both(mlo.Problem):
    def loss(self, batch, low):
        one, two = low()
        return (one * two).sum()


@pytest.mark.parametrize("memory", [0.0, 0.0004, 16.0])  # none joined, two of them, all
def test_a_variable_that_a_step_does_not_reach_is_not_decayed_by_it(memory):
    low, top = Halves(), Value(0.5, 0.2)
    sgd = torch.optim.SGD(low.parameters(), lr=RATE, momentum=0.9, weight_decay=0.5)
    problems = [
        HalfSteps("low", module=low, optimizer=sgd, steps=4),
        Both("top", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=0.0)),
    ]
    engine = mlo.Engine(problems, {"kind": "unrolled", "graph_memory": memory}, device="cpu")
    x, buffers = top.value.detach().clone().requires_grad_(), [torch.zeros(2, dtype=torch.float64)] * 2
    values = [low.one.detach(), low.two.detach()]
    for turn in range(3):
        values, buffers = ([each.detach() for each in of] for of in (values, buffers))
        for step in range(4):
            for index in range(1 if step % 2 else 2):
                along = 2 * values[index] * x + 0.5 * values[index]
                buffers[index] = 0.9 * buffers[index] + along
                values[index] = values[index] - RATE * buffers[index]
        (expected,) = torch.autograd.grad((values[0] * values[1]).sum(), x)
        torch.testing.assert_close(engine.hypergradient("top")["value"], expected, msg=lambda m, n=turn: f"{n}: {m}")
        engine.step()


@pytest.mark.parametrize("every", [1, 3])
def test_adam_leaves_the_moments_of_a_variable_that_a_step_does_not_reach(every):
    low, top, eps = Halves(), Value(0.5, 0.2), 0.1
    adam = torch.optim.Adam(low.parameters(), lr=RATE, eps=eps)
    problems = [
        HalfSteps("low", module=low, optimizer=adam, steps=4),
        Both("top", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=0.0)),
    ]
    engine = mlo.Engine(problems, {"kind": "unrolled", "every": every}, device="cpu")
    x, zeros = top.value.detach().clone().requires_grad_(), torch.zeros(2, dtype=torch.float64)
    values, means, squares, counts = [low.one.detach(), low.two.detach()], [zeros] * 2, [zeros] * 2, [0, 0]
    for _ in range(2):
        values, means, squares = ([each.detach() for each in of] for of in (values, means, squares))
        for step in range(4):
            for i in range(1 if step % 2 else 2):
                gradient = 2 * values[i] * x
                counts[i] += 1
                means[i] = 0.9 * means[i] + 0.1 * gradient
                squares[i] = 0.999 * squares[i] + 0.001 * gradient.square()
                mean, square = means[i] / (1 - 0.9 ** counts[i]), squares[i] / (1 - 0.999 ** counts[i])
                values[i] = values[i] - RATE * mean / (square.sqrt() + eps)
        (expected,) = torch.autograd.grad((values[0] * values[1]).sum(), x)
        torch.testing.assert_close(engine.hypergradient("top")["value"], expected)
        engine.step()


class Stray(mlo.Problem):
    """Uses its module's own variables next to the substituted ones."""

    def loss(self, batch, top):
        return (self() * self.module.value * top()).sum()


@pytest.mark.filterwarnings("ignore:problem 'low'")
def test_what_a_loss_takes_from_its_module_is_constant_in_virtual_steps_too():
    low, top = Value(0.3, -0.7), Value(0.5, 0.2)
    problems = [
        Stray("low", module=low, optimizer=torch.optim.SGD(low.parameters(), lr=RATE)),
        Top("top", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=RATE)),
    ]
    engine = mlo.Engine(problems, "one_step", device="cpu")
    found = engine.hypergradient("top")["value"]
    value, weight = low.value.detach(), top.value.detach()
    torch.testing.assert_close(found, 2 * (value - RATE * value * weight) * -RATE * value)


class Scale(Value):
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
    low, top = Value(0.3, -0.7), Scale(0.5, 0.2)
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


class Box:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class Boxed(Value):
    def forward(self) -> Box:
        return Box(self.value.square())


class Opening(mlo.Problem):
    def loss(self, batch, top):
        return (self() * top().value).sum()


@pytest.mark.parametrize("product", ["exact", "forward", "central", "one_sided"])
def test_what_is_read_may_be_an_object_of_any_class(product):
    """Its tensors cannot be found in it, to be cut out of the graph: it is computed anew for each evaluation."""
    low, top = Value(0.3, -0.7), Boxed(0.5, 0.2)
    problems = [
        Opening("low", module=low, optimizer=torch.optim.SGD(low.parameters(), lr=RATE)),
        Other("top", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=RATE)),
    ]
    engine = mlo.Engine(problems, {"kind": "one_step", "product": product}, device="cpu")
    value, x = low.value.detach(), top.value.detach()
    expected = 2 * (value - RATE * x.square()) * -RATE * 2 * x
    torch.testing.assert_close(engine.hypergradient("top")["value"], expected, rtol=1e-7, atol=0)


class Constant(mlo.Problem):
    def loss(self, batch, top):
        with torch.no_grad():
            constant = top()
        return (self() * (constant + top().square())).sum()


def test_what_is_read_without_gradients_is_constant():
    low, top = Value(0.3, -0.7), Value(0.5, 0.2)
    problems = [
        Constant("low", module=low, optimizer=torch.optim.SGD(low.parameters(), lr=RATE)),
        Other("top", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=RATE)),
    ]
    engine = mlo.Engine(problems, "one_step", device="cpu")
    value, x = low.value.detach(), top.value.detach()
    stepped = value - RATE * (x + x.square())
    torch.testing.assert_close(engine.hypergradient("top")["value"], 2 * stepped * -RATE * 2 * x)


class Waves(mlo.Problem):
    def loss(self, batch, top):
        return (self() * top()).sin().sum()


@pytest.mark.parametrize("begins", [{}, {"momentum_buffer": None}], ids=["without state", "with None"])
@pytest.mark.parametrize("memory", [0.0, 16.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_dampening_begins_with_the_second_step(steps, memory, begins):
    """SGD's first buffer is the whole gradient; a state that holds None, as of old checkpoints, is none."""
    low, top = Value(0.3, -0.7), Value(0.5, 0.2)
    sgd = torch.optim.SGD(low.parameters(), lr=RATE, momentum=0.9, dampening=0.4)
    sgd.state[low.value].update(begins)
    problems = [
        Waves("low", module=low, optimizer=sgd, steps=steps),
        Top("top", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=RATE)),
    ]
    engine = mlo.Engine(problems, {"kind": "unrolled", "graph_memory": memory}, lookahead=False, device="cpu")
    buffer = None
    for _ in range(3):
        value, x = low.value.detach().requires_grad_(), top.value.detach().clone().requires_grad_()
        for _ in range(steps):
            (gradient,) = torch.autograd.grad((value * x).sin().sum(), value, create_graph=True)
            buffer = gradient if buffer is None else 0.9 * buffer + 0.6 * gradient
            value = value - RATE * buffer
        (expected,) = torch.autograd.grad(value.square().sum(), x)
        torch.testing.assert_close(engine.hypergradient("top")["value"], expected, rtol=1e-10, atol=0)
        engine.step()
        torch.testing.assert_close(top.value.detach(), (x - RATE * expected).detach(), rtol=1e-10, atol=0)
        buffer = buffer.detach()


class ReadsHalves(mlo.Problem):
    def loss(self, batch, top):
        one, two = top()
        return (self() * (one + two.sin())).sum()


class HalfDirect(mlo.Problem):
    def loss(self, batch, low):
        return self()[0].square().sum() + low().square().sum()


@pytest.mark.parametrize("lookahead", [False, True])
def test_a_loss_may_depend_directly_on_some_of_its_own_variables_only(lookahead):
    low, top = Value(0.3, -0.7), Halves()
    problems = [
        ReadsHalves("low", module=low, optimizer=torch.optim.SGD(low.parameters(), lr=RATE)),
        HalfDirect("top", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=RATE)),
    ]
    engine = mlo.Engine(problems, "one_step", lookahead=lookahead, device="cpu")
    one, two = top.one.detach().clone(), top.two.detach().clone()
    through = 2 * (low.value.detach() - RATE * (one + two.sin())) * -RATE
    engine.step()
    torch.testing.assert_close(top.one.detach(), one - RATE * (2 * one + through))
    torch.testing.assert_close(top.two.detach(), two - RATE * through * two.cos())


class Cubic(mlo.Problem):
    def loss(self, batch, top):
        return ((1 + self.steps_taken) * batch * self().pow(3) / 6 * top()).sum()


class AtSolution(mlo.Estimator):
    """Notes the curvature at the solution on the batch of each record, along ones."""

    joined: bool = False
    curvatures: ClassVar[list[Tensor]] = []

    @property
    def recording(self):
        return mlo.Recording(last=None, before=True, graph=self.joined, graph_bytes=2.0**20 if self.joined else 0.0)

    def pull(self, steps, cotangent, targets, warm):
        ones = (torch.ones_like(cotangent[0]),)
        self.curvatures[:] = [Exact().after(step, targets)(ones, cross=False)[0][0] for step in steps]
        return mlo.Pulled(dict.fromkeys(targets, cotangent))


@pytest.mark.parametrize("joined", [False, True])
def test_all_steps_of_a_round_have_its_solution(joined):
    """The record of several steps in one graph has the batch and the count of the last of them."""
    low, top = Value(0.3, -0.7), Value(0.5, 0.2)
    data = [torch.tensor(factor, dtype=torch.float64) for factor in (1.0, -2.0, 3.0)]
    problems = [
        Cubic("low", module=low, optimizer=torch.optim.SGD(low.parameters(), lr=RATE), data=data, steps=3),
        Top("top", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=RATE)),
    ]
    engine = mlo.Engine(problems, AtSolution(joined=joined), lookahead=False, device="cpu")
    for turn in range(2):  # the first round measures a graph
        x = top.value.detach().clone()
        engine.step()
        expected = [(1 + 3 * turn + i) * factor * low.value.detach() * x for i, factor in enumerate(data)]
        torch.testing.assert_close(AtSolution.curvatures, expected[-1:] if joined and turn else expected)
