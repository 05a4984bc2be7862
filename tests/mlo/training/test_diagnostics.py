"""diagnose: estimators are compared, and nothing is changed."""

from __future__ import annotations

import pytest
import torch
from analytic import Point
from engine_state import same, snapshot
from small_lbt import noisy_lbt
from torch import nn

import mlo
from mlo.hypergradient import Pulled


def test_diagnose_compares_every_registered_estimator_and_changes_nothing():
    stack = noisy_lbt()
    stack[0].hypergradient = "cg"
    engine = mlo.Engine(stack, "darts", device="cpu")
    engine.run(2)
    before = snapshot(stack)
    rows = {row.estimator: row for row in mlo.diagnose(engine).rows}
    assert same(snapshot(stack), before)
    assert stack[0].hypergradient == "cg"
    assert {"cg", "darts", "first_order", "neumann", "nystrom", "one_step", "penalty", "sama", "truncated"} <= set(rows)
    assert rows["one_step"].error < 1e-4
    assert rows["unrolled"].error < 1e-4
    assert rows["first_order"].error > 0.01
    assert rows["unrolled"].cosine == pytest.approx(1, abs=1e-4)
    assert rows["first_order"].passes == 5
    assert rows["one_step"].passes == 5
    assert rows["darts"].passes == 9
    assert all(row.milliseconds > 0 and row.peak > 0 for row in rows.values())


def test_diagnose_prints_a_table_with_what_cannot_be_had():
    class Low(mlo.Problem):
        def loss(self, batch, top):
            return (self(batch) - top(batch)).square().mean()

    class Top(mlo.Problem):
        def loss(self, batch, low):
            return low(batch).square().mean() + self(batch).square().mean()

    data, one, two = [torch.randn(4, 3)], nn.Linear(3, 2), nn.Linear(3, 2)
    low = Low("low", module=one, optimizer=torch.optim.SGD(one.parameters(), lr=0.1), data=data)
    top = Top("top", module=two, optimizer=torch.optim.SGD(two.parameters(), lr=0.1), data=data)
    engine = mlo.Engine([low, top], "one_step", device="cpu")
    text = str(mlo.diagnose(engine, estimators=["one_step", {"kind": "cg", "iterations": 3}, "nonsense"]))
    columns = ["estimator", "error", "cosine", "residual", "passes", "ms", "peak", "MB", "note"]
    assert text.splitlines()[0].split() == columns
    assert "'nonsense' is not known" in " ".join(text.split())  # a note may take several lines


def test_diagnose_reports_how_well_an_iterative_estimator_has_solved():
    """Curvatures 1 and 4: cg needs two iterations, and its residual after one is known from the right-hand side."""

    class Low(mlo.Problem):
        def loss(self, batch, top):
            return 0.5 * (torch.tensor([1.0, 4.0]) * (self() - top()).square()).sum()

    class Top(mlo.Problem):
        def loss(self, batch, low):
            return low().sum()

    low, top = Point(torch.zeros(2)), Point(torch.ones(2))
    stack = [
        kind(name, module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1))
        for kind, name, module in ((Low, "low", low), (Top, "top", top))
    ]
    engine = mlo.Engine(stack, device="cpu")
    asked = [{"kind": "cg", "iterations": 1}, {"kind": "neumann", "terms": 3, "rate": 0.1}, "nystrom", "one_step"]
    once, neumann, nystrom, one_step = (row.residual for row in mlo.diagnose(engine, estimators=asked).rows)
    # v = (1, 1): the stride is v'v / v'Hv = 2/5, and the residual v - 2/5 Hv = (3/5, -3/5), as large as 3/5 of v
    assert once == pytest.approx(0.6, abs=1e-6)
    assert neumann == pytest.approx(((0.9**4 + 0.6**4) / 2) ** 0.5, abs=1e-6)  # the term (I - 0.1 H)^2 v
    assert nystrom < 1e-3
    assert one_step is None
    assert not engine.metrics()


def test_a_difference_across_kinks_is_warned_of():
    torch.manual_seed(0)

    class Low(mlo.Problem):
        def loss(self, batch, top):
            return (self(batch) * top()).square().mean()

    class Top(mlo.Problem):
        def loss(self, batch, low):
            return low(batch).square().mean()

    deep = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 2))
    point, data = Point(torch.ones(2)), [torch.randn(16, 8)]
    low = Low("low", module=deep, optimizer=torch.optim.SGD(deep.parameters(), lr=0.1), data=data)
    top = Top("top", module=point, optimizer=torch.optim.SGD(point.parameters(), lr=0.1), data=data)
    engine = mlo.Engine([low, top], device="cpu")
    wide = {"kind": "darts", "radius": 5.0}
    rows = {row.estimator: row for row in mlo.diagnose(engine, estimators=["one_step", wide]).rows}
    assert "use product 'exact'" in rows[str(wide)].note
    assert not rows["one_step"].note


def test_of_several_residuals_diagnose_has_the_largest_and_of_other_reports_none():
    class Reporting(mlo.hypergradient.Estimator):
        def pull(self, steps, cotangent, targets, warm):
            residual = {"one": 0.1, "two": 0.4}[steps[-1].point.level.name]
            found = {target: tuple(torch.zeros_like(c) for c in cotangent) for target in targets}
            return Pulled(found, {"residual": torch.tensor(residual), "size": torch.tensor(7.0)})

    class Low(mlo.Problem):
        def loss(self, batch, top):
            return (self() - top()).square().sum()

    class Top(mlo.Problem):
        def loss(self, batch, one, two):
            return (one() * two()).sum()

    stack = []
    for kind, name in ((Low, "one"), (Low, "two"), (Top, "top")):
        module = Point(torch.ones(2))
        stack.append(kind(name, module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1)))
    (row,) = mlo.diagnose(mlo.Engine(stack, device="cpu"), estimators=[Reporting()]).rows
    assert row.residual == pytest.approx(0.4)


NOISES = {
    "randn_like": torch.randn_like,
    "rand_like": torch.rand_like,
    "dtype": lambda x: torch.randn(x.shape, dtype=torch.float32),
    "dtype of another": lambda x: torch.randn(x.shape, dtype=x.dtype),
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 0.5)),
    "gumbel": lambda x: nn.functional.gumbel_softmax(torch.zeros_like(x)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("noise", NOISES)
def test_a_loss_that_draws_is_compared_with_the_same_draws(noise, dtype):
    class Low(mlo.Problem):
        def loss(self, batch, top):
            noisy = batch + top().exp() * NOISES[noise](batch)
            return (self(noisy) - 1).square().mean()

    class Top(mlo.Problem):
        def loss(self, batch, low):
            return (low(batch + 0.1 * NOISES[noise](batch)) - 2).square().mean()

    torch.manual_seed(0)
    module, scale, data = nn.Linear(4, 1).to(dtype), Point(torch.zeros(())).to(dtype), [torch.randn(32, 4).to(dtype)]
    low = Low("low", module=module, optimizer=torch.optim.SGD(module.parameters(), 0.1), data=data, steps=2)
    top = Top("top", module=scale, optimizer=torch.optim.SGD(scale.parameters(), 0.1), data=data)
    engine = mlo.Engine([low, top], "unrolled", device="cpu")
    mlo.check(engine)
    (row,) = mlo.diagnose(engine, estimators=["unrolled"]).rows
    assert row.error < 1e-5


def test_diagnose_says_that_it_needs_second_derivatives():
    class Low(mlo.Problem):
        def loss(self, batch, top):
            return (self(batch) * top().exp() - 1).square().mean()

    class Top(mlo.Problem):
        def loss(self, batch, low):
            return low(batch).square().mean()

    module, scale, data = nn.EmbeddingBag(5, 4), Point(torch.zeros(())), [torch.arange(6).reshape(3, 2) % 5]
    low = Low("low", module=module, optimizer=torch.optim.SGD(module.parameters(), 0.1), data=data)
    top = Top("top", module=scale, optimizer=torch.optim.SGD(scale.parameters(), 0.1), data=data)
    engine = mlo.Engine([low, top], "darts", device="cpu")
    with pytest.raises(
        mlo.GraphError, match=r"embedding_bag.*diagnose compares with an exact .*use mlo\.check"
    ) as error:
        mlo.diagnose(engine)
    assert "darts" not in str(error.value)
