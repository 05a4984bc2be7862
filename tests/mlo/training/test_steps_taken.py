"""A loss that asks how many steps were taken gets the count of the step that is evaluated, whenever that is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from two_levels import Value

import mlo

RATE = 0.1


class Low(mlo.Problem):
    def loss(self, batch, top):
        return (self.steps_taken % 3 + 1) * (self() * top()).sin().sum()


class Top(mlo.Problem):
    def loss(self, batch, low):
        return low().exp().sum()


def engine(estimator: object, lookahead: bool, optimizer=torch.optim.SGD) -> mlo.Engine:
    low, top = Value(0.3, -0.5), Value(0.7, 0.2)
    made = [
        Low("low", module=low, optimizer=optimizer(low.parameters(), lr=RATE), steps=3),
        Top("top", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=RATE)),
    ]
    return mlo.Engine(made, estimator, lookahead=lookahead, device="cpu")


def by_hand(low: Tensor, top: Tensor, last: int = 3) -> Tensor:
    top = top.detach().requires_grad_()
    for step in range(3):
        low = low.detach().requires_grad_() if step <= 3 - last else low
        loss = (step + 1) * (low * top).sin().sum()
        low = low - RATE * torch.autograd.grad(loss, low, create_graph=True)[0]
    return torch.autograd.grad(low.exp().sum(), top)[0]


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"graph_memory": 0},
        {"every": 3},
        {"product": "forward"},
        {"every": 2, "product": "forward"},
        {"kind": "truncated", "steps": 2},
    ],
    ids=str,
)
def test_every_way_to_differentiate_a_step_sees_its_count(options, lookahead):
    made = engine({"kind": "unrolled", **options}, lookahead)
    low, top = (p.module.value for p in made.problems.values())
    for _ in range(3):  # the first round measures graphs, later ones may join steps
        expected = by_hand(low, top, options.get("steps", 3))
        torch.testing.assert_close(made.hypergradient("top")["value"], expected, rtol=1e-10, atol=0)
        before = top.detach().clone()
        made.step()
        torch.testing.assert_close(before - top.detach(), RATE * expected, rtol=1e-10, atol=0)
    assert made.problems["low"].steps_taken == 9


def test_check_and_adam_see_it_too():
    made = engine("unrolled", False, torch.optim.Adam)
    made.run(1)
    mlo.check(made)


def test_that_a_loss_asked_is_remembered_since_compiled_steps_cannot_count():
    made = engine("unrolled", False)
    made.run(1)
    assert [p.asks_steps_taken for p in made.problems.values()] == [True, False]


class CountingTop(mlo.Problem):
    def loss(self, batch, low):
        return (self.steps_taken + 1) * low().exp().sum()


def test_an_objective_is_that_of_the_next_step():
    low, top = Value(0.3, -0.5), Value(0.7, 0.2)
    made = mlo.Engine(
        [
            Low("low", module=low, optimizer=torch.optim.SGD(low.parameters(), lr=RATE)),
            CountingTop("top", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=0.0)),
        ],
        "one_step",
        device="cpu",
    )
    for count in range(3):
        at, weight = low.value.detach(), top.value.detach()
        stepped = at - RATE * (count + 1) * weight * (at * weight).cos()
        torch.testing.assert_close(made.objective("top"), (count + 1) * stepped.exp().sum())
        made.step()


class InnerLow(mlo.Problem):
    def loss(self, batch, mid):
        return (self.steps_taken + 1) * (self() * mid()).sum()


class Mid(mlo.Problem):
    def loss(self, batch, low, top):
        return (low() * top()).sum() + self().square().sum()


class Far(mlo.Problem):
    def loss(self, batch, mid):
        return mid().square().sum()


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("product", ["exact", "forward", "central", "one_sided"])
def test_steps_on_an_inner_path_see_their_count_and_their_rate(product, accumulate, steps):
    """A scheduler halves the rate after each real step of the lowest problem; virtual ones have the present rate."""
    low, mid, top = Value(0.3, -0.5), Value(0.7, 0.2), Value(-0.4, 0.9)
    made = []
    for cls, name, module in ((InnerLow, "low", low), (Mid, "mid", mid), (Far, "top", top)):
        optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
        made.append(cls(name, module=module, optimizer=optimizer, accumulate=accumulate))
    made[0].steps, made[0].scheduler = steps, torch.optim.lr_scheduler.StepLR(made[0].optimizer, 1, gamma=0.5)
    options = {"kind": "one_step" if steps == 1 else "unrolled", "product": product}
    engine = mlo.Engine(made, options, inner_path=True, lookahead=False, device="cpu")
    count = 0
    for _ in range(3):
        rate, middle, x = RATE * 0.5**count, mid.value.detach().clone(), top.value.detach().clone()
        for real in (False, True):  # the next lower variables are the present ones minus the slope times mid
            slope = sum(rate * (0.5**step if real else 1.0) * (count + step + 1) for step in range(steps))
            expected = 2 * (middle - RATE * (2 * middle - slope * x)) * RATE * slope
            if real:
                engine.step()
                torch.testing.assert_close(top.value.detach(), x - RATE * expected, rtol=1e-10, atol=0)
            else:
                torch.testing.assert_close(engine.hypergradient("top")["value"], expected)
        count += steps


def test_a_resumed_engine_knows_that_a_loss_asked():
    made, resumed = engine("unrolled", False), engine("unrolled", False)
    made.run(1)
    resumed.load_state_dict(made.state_dict())
    assert [p.asks_steps_taken for p in resumed.problems.values()] == [True, False]


class Now(mlo.Problem):
    """Reads the upper problem at every second step only."""

    def loss(self, batch, top):
        own = self().square().sum()
        return own if self.steps_taken % 2 else own + (self() * top()).sin().sum()


@pytest.mark.parametrize("kind", ["one_step", "darts", "sama", "unrolled", "truncated", "cg", "neumann", "penalty"])
def test_a_lower_problem_may_read_an_upper_one_only_sometimes(kind):
    low, top = Value(0.3, -0.5), Value(0.7, 0.2)
    made = [
        Now("low", module=low, optimizer=torch.optim.SGD(low.parameters(), lr=RATE), sometimes="top"),
        Top("top", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=RATE)),
    ]
    stepping = mlo.Engine(made, kind, device="cpu")
    for reads in (True, False, True, False):
        found = stepping.hypergradient("top")["value"]
        assert bool(found.any()) == reads
        before = top.value.detach().clone()
        stepping.step()
        assert torch.equal(before != top.value, torch.full((2,), reads))
    made[0].node = replace(made[0].node, sometimes=())
    with pytest.raises(mlo.GraphError, match="no gradient flows through that read"):
        mlo.Engine(made, kind, device="cpu").run(2)
