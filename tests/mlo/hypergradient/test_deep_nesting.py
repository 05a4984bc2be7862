"""Levels nested to any depth, with their inner paths, against brute-force autograd on random graphs of 3 to 5 levels.

A middle level steps on its total gradient, which runs through the steps of the levels below it; those may be nested in
turn. They read the level as it was before its first step of the round. Its gradient at a later step is that of a shift
of both points. By brute force, each step takes the steps of the levels below anew, as a function of that shift.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from analytic import LR, Point, Shape, Smooth
from torch import Tensor, nn

import mlo

CHAIN = {"a": ("b",), "b": ("a", "c"), "c": ("b", "top"), "top": ("c",)}
DIAMOND = {"a": ("left", "right", "top"), "left": ("a", "top"), "right": ("a", "left", "top"), "top": ("left", "right")}
MOMENTUM = 0.9
Values = dict[str, Tensor]


@dataclass
class Nested:
    """A stack of which each level below the top takes ``steps`` steps a round."""

    reads: dict[str, tuple[str, ...]]
    steps: int

    def __post_init__(self) -> None:
        self.made = Smooth.make(Shape("nested", self.reads), seed=len(self.reads), settled=False)
        self.names = list(self.reads)
        self.problems = self.made.problems(momentum=MOMENTUM)
        for problem in self.problems[:-1]:
            problem.steps = self.steps

    def _runs_through_lower(self, name: str) -> bool:
        """Whether the loss of a level depends on its own variables through levels below it."""
        below, reached, waiting = self.names[: self.names.index(name)], set(), [name]
        while waiting:
            reader = waiting.pop()
            lower = self.names[: self.names.index(reader)]
            new = [r for r in self.reads[reader] if r in lower and r not in reached]
            reached.update(new)
            waiting += new
        return any(name in self.reads[low] for low in reached & set(below))

    def settled(self, count: int, values: Values) -> Values:
        """The lowest ``count`` levels after their steps of a round, where each starts at ``values``, with the graph."""
        after = dict(values)
        for index, name in enumerate(self.names[:count]):
            own, buffer = values[name], None
            for _ in range(self.problems[index].steps):
                shift = torch.zeros_like(own, requires_grad=True)
                lower = self.settled(index, {**values, name: values[name] + shift})
                there = {**values, **{low: lower[low] for low in self.names[:index]}, name: own + shift}
                found = torch.autograd.grad(self.made.loss(name, there), shift, create_graph=True)[0]
                buffer = found if buffer is None else MOMENTUM * buffer + found
                own = own - LR * buffer
            after[name] = own
        return after

    def brute_force(self) -> Tensor:
        values = {
            n: p.module.value.detach().clone().requires_grad_() for n, p in zip(self.names, self.problems, strict=True)
        }
        top = self.names[-1]
        after = self.settled(len(self.names) - 1, values)
        return torch.autograd.grad(self.made.loss(top, after), values[top])[0]


def engine(nested: Nested, estimator: object, **options: object) -> mlo.Engine:
    return mlo.Engine(nested.problems, estimator, inner_path=True, device="cpu", **options)


def drawn(seed: int) -> Nested | None:
    draw = random.Random(seed)
    names = [f"p{index}" for index in range(draw.choice([3, 4, 4, 5]))]
    reads = {n: tuple(r for r in names if r != n and draw.random() < 0.6) for n in names}
    nested = Nested(reads, draw.choice([1, 2]))
    try:
        deep = len(engine(nested, "unrolled").graph.names) > 3 and any(
            nested._runs_through_lower(name) for name in nested.names[1:-1]
        )
    except mlo.GraphError:
        return None
    return nested if deep else None


SEEDS = [seed for seed in range(120) if drawn(seed)][:24]


@pytest.mark.parametrize("estimator", ["unrolled", {"kind": "unrolled", "product": "forward"}], ids=str)
@pytest.mark.parametrize("steps", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reads", [CHAIN, DIAMOND], ids=["chain", "diamond"])
def test_levels_nested_in_nested_ones(reads, steps, estimator):
    nested = Nested(reads, steps)
    made = engine(nested, estimator)
    expected = nested.brute_force()
    torch.testing.assert_close(made.hypergradient("top")["value"], expected, rtol=1e-10, atol=1e-13)
    before = nested.problems[-1].module.value.detach().clone()
    made.step()  # without lookahead, the top steps on the real steps of the others
    torch.testing.assert_close(before - nested.problems[-1].module.value, LR * expected, rtol=1e-10, atol=1e-13)
    mlo.check(made)


@pytest.mark.parametrize("steps", [1, 2])
def test_five_levels_that_all_read_one_another(steps):
    """In the steps of one level, those below it read what lies between as it was, even if that was taken again."""
    nested = Nested({name: tuple("abcde".replace(name, "")) for name in "abcde"}, steps)
    found = engine(nested, "unrolled").hypergradient("e")["value"]
    torch.testing.assert_close(found, nested.brute_force(), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_graphs(seed):
    nested = drawn(seed)
    found = engine(nested, "unrolled").hypergradient(nested.names[-1])["value"]
    torch.testing.assert_close(found, nested.brute_force(), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("product", ["exact", "forward"])
@pytest.mark.parametrize("held", ["none", "low", "mid"])
def test_a_read_that_is_held_is_a_constant_in_the_inner_path_too(held, product):
    """Held by one problem, it is differentiated in the other all the same."""

    def value(start: list[float]) -> Point:
        return Point(torch.tensor(start, dtype=torch.float64))

    class Low(mlo.Problem):
        def loss(self, batch, mid, top):
            return (self() * mid()).sin().sum() + (self() * top()).exp().sum()

    class Mid(mlo.Problem):
        def loss(self, batch, low, top):
            return (self() - low().cos()).square().sum() + (self() * top()).exp().sum()

    class Top(mlo.Problem):
        def loss(self, batch, mid, low):
            return (mid() * self()).sum() + low().square().sum()

    low, mid, top = value([0.3, -0.7]), value([0.5, 0.2]), value([-0.4, 0.9])
    classes, modules, options = (
        (Low, Mid, Top),
        (low, mid, top),
        [{"held": "top"} if n == held else {} for n in ("low", "mid", "top")],
    )
    problems = [
        c(n, module=m, optimizer=torch.optim.SGD(m.parameters(), lr=LR), **o)
        for c, n, m, o in zip(classes, ("low", "mid", "top"), modules, options, strict=True)
    ]
    a, b, x = (m.value.detach().clone().requires_grad_() for m in modules)
    seen = {name: x.detach() if name == held else x for name in ("low", "mid")}
    slope = torch.autograd.grad((a * b).sin().sum() + (a * seen["low"]).exp().sum(), a, create_graph=True)[0]
    a = a - LR * slope
    direct = (b - a.cos()).square().sum() + (b * seen["mid"]).exp().sum()
    total = torch.autograd.grad(direct, b, create_graph=True)[0]
    loss = ((b - LR * total) * x).sum() + a.square().sum()
    made = mlo.Engine(problems, {"kind": "one_step", "product": product}, inner_path=True, device="cpu")
    found = made.hypergradient("top")["value"]
    torch.testing.assert_close(found, torch.autograd.grad(loss, x)[0], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
        (torch.optim.Adam, {"lr": 0.05}),
        (torch.optim.AdamW, {"lr": 0.05, "amsgrad": True}),
        (torch.optim.RMSprop, {"lr": 0.05, "momentum": 0.5, "centered": True}),
        (torch.optim.Adagrad, {"lr": 0.05}),
    ],
)
@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.LayerNorm(2)], ids=["linear", "layer norm"])
@pytest.mark.parametrize(("estimator", "count"), [("unrolled", 2), ("one_step", 1)])
def test_inner_paths_through_modules_of_several_small_parameters(estimator, count, norm, optimizer, options, float64):
    class Low(mlo.Problem):
        def loss(self, batch, mid, top):
            return (self(batch) - mid(batch)).square().mean() + (self(batch) * top(batch)).sin().mean()

    class Mid(mlo.Problem):
        def loss(self, batch, low, top):
            return (self(batch) * low(batch)).exp().mean() + (self(batch) - top(batch)).square().mean()

    class Top(mlo.Problem):
        def loss(self, batch, mid):
            return mid(batch).sin().mean()

    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Linear(3, 2), nn.Tanh(), norm(), nn.Linear(2, 2)) for _ in range(3)]
    data = [torch.randn(4, 3)]
    problems = [
        cls(name, module=module, optimizer=optimizer(module.parameters(), **options), data=data, steps=steps)
        for cls, name, module, steps in zip((Low, Mid, Top), ("low", "mid", "top"), modules, (count, 1, 1), strict=True)
    ]
    made = mlo.Engine(problems, estimator, inner_path=True, device="cpu")
    made.run(2)
    mlo.check(made)
