"""Virtual steps that differ from the real ones, and losses that do not read everything at every step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mlo

LR = 0.1


class Weight(nn.Module):
    def __init__(self, *start: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self) -> torch.Tensor:
        return self.w


class Fit(mlo.Problem):
    """Notes whether it is evaluated in a virtual step."""

    def __init__(self, name: str, **problem: object) -> None:
        super().__init__(name, **problem)
        self.seen: list[bool] = []

    def loss(self, batch, top):
        self.seen.append(self.looking_ahead)
        return (self() - top()).pow(2).sum() + batch * self().pow(3).sum() / 6


class Judge(mlo.Problem):
    def loss(self, batch, fit):
        return (fit() - 1).pow(2).sum() + 0.1 * self().pow(2).sum()


def stack(**fit: object) -> list[mlo.Problem]:
    fitted, judged = Weight(2.0, -3.0), Weight(0.5, 0.7)
    sgd = torch.optim.SGD(fitted.parameters(), lr=LR, momentum=0.9)
    batches = [torch.tensor(float(n)) for n in range(1, 8)]
    return [
        Fit("fit", module=fitted, optimizer=sgd, data=batches, **fit),
        Judge("top", module=judged, optimizer=torch.optim.SGD(judged.parameters(), lr=LR)),
    ]


def engine(*, lookahead: bool = True, estimator: str = "unrolled", **fit: object) -> mlo.Engine:
    return mlo.Engine(stack(**fit), estimator, lookahead=lookahead, device="cpu")


def upper(of: mlo.Engine) -> torch.Tensor:
    return of.hypergradient("top")["w"]


def test_fewer_virtual_steps_than_real_ones():
    few = engine(steps=3, steps_ahead=1)
    assert torch.equal(upper(few), upper(engine(steps=1)))
    assert not torch.equal(upper(few), upper(engine(steps=3)))
    assert few.objective("top") == engine(steps=1).objective("top")
    few.step()
    assert few.problems["fit"].steps_taken == 3
    assert few.problems["fit"].seen.count(False) == 3
    mlo.check(few)


def test_without_lookahead_there_is_nothing_else_than_the_real_steps():
    found = engine(lookahead=False, steps=3, steps_ahead=1, clip_norm=0.1, clip_ahead=False)
    assert torch.equal(upper(found), upper(engine(lookahead=False, steps=3, clip_norm=0.1)))
    found.step()
    assert not any(found.problems["fit"].seen)


def test_clipping_can_be_left_out_of_virtual_steps():
    found, clipped, free = engine(clip_norm=0.1, clip_ahead=False), engine(clip_norm=0.1), engine()
    assert torch.equal(upper(found), upper(free))
    assert not torch.allclose(upper(found), upper(clipped))
    for one in (found, clipped, free):
        one.problems["top"].optimizer.param_groups[0]["lr"] = 0.0
        one.step()
    steps = [one.problems["fit"].module.w.detach() for one in (found, clipped, free)]
    assert torch.equal(steps[0], steps[1]), "real steps are clipped"
    assert not torch.allclose(steps[0], steps[2])
    mlo.check(found)


@pytest.mark.parametrize("estimator", ["unrolled", "one_step", "darts", "cg"])
def test_a_loss_knows_whether_it_is_in_a_virtual_step(estimator):
    found = engine(estimator=estimator)
    if estimator == "darts":
        assert found.report().lookahead
    found.step()
    seen = found.problems["fit"].seen
    assert seen[-1] is False
    assert all(seen[:-1]), "the virtual step, and its products"
    upper(found)
    assert seen.count(False) == 1
    assert not found.problems["fit"].looking_ahead


def test_an_error_while_looking_ahead_ends_it():
    found = engine()
    found.problems["top"].loss = lambda batch, fit: 1 / 0
    with pytest.raises(ZeroDivisionError):
        found.step()
    assert not found.problems["fit"].looking_ahead


class InTurn(mlo.Problem):
    def loss(self, batch, fit, other):
        judged = other if self.steps_taken % 2 else fit
        return (judged() - 1).pow(2).sum()


def in_turn(**top: object) -> mlo.Engine:
    fit, _ = stack()
    module, judged = Weight(1.0, 4.0), Weight(0.5, 0.7)
    other = Fit(
        "other", module=module, optimizer=torch.optim.SGD(module.parameters(), lr=2 * LR), data=[torch.ones(())]
    )
    adam = torch.optim.Adam(judged.parameters(), lr=0.1)
    return mlo.Engine([fit, other, InTurn("top", module=judged, optimizer=adam, steps=2, **top)], "darts", device="cpu")


def test_a_loss_may_read_one_problem_and_then_another():
    found = in_turn(sometimes=("fit", "other"))
    at = [torch.tensor([2.0, -3.0]), torch.tensor([1.0, 4.0])]
    gradients = []
    for turn, (start, lr) in enumerate(zip(at, (LR, 2 * LR), strict=True)):
        top = found.problems["top"].module.w.detach().clone()
        found.problems["top"].steps_taken = turn
        stepped = start - lr * (2 * (start - top) + start.pow(2) / 2)
        gradients.append(2 * (stepped - 1) * 2 * lr)
        torch.testing.assert_close(upper(found), gradients[-1])
    found.problems["top"].steps_taken = 0
    found.step()
    assert found.pullbacks["fit"] == found.pullbacks["other"] == 2, (
        "each in its virtual steps, and in one real step of two"
    )


def test_a_read_without_a_gradient_is_an_error_unless_declared():
    with pytest.raises(mlo.GraphError, match="reads 'other', but no gradient flows"):
        in_turn(sometimes="fit").step()
    with pytest.raises(mlo.GraphError, match="sometimes='oter' is not among what its loss reads"):
        in_turn(sometimes="oter")


@pytest.mark.parametrize("steps", [0, 1.5, True])
def test_wrong_counts_raise(steps):
    with pytest.raises(mlo.ConfigError, match=r"steps_ahead=.*whole number, 1 or more"):
        stack(steps_ahead=steps)


class ForTwo(mlo.Problem):
    def loss(self, batch, one, two):
        return (self() - one() * two()).pow(2).sum()


def test_a_top_takes_no_virtual_steps_for_another_top():
    problems = []
    for cls, name, reads in ((ForTwo, "low", {}), (Judge, "one", {"fit": "low"}), (Judge, "two", {"fit": "low"})):
        module = Weight(0.5, 0.7)
        optimizer = torch.optim.SGD(module.parameters(), lr=LR)
        problems.append(cls(name, module=module, optimizer=optimizer, reads=reads))
    found = mlo.Engine(problems, "one_step", lookahead=True, device="cpu")
    found.step()
    upper_passes = {name: dict(found.passes[name]) for name in ("one", "two")}
    assert all("virtual" not in passes for passes in upper_passes.values())
    assert found.passes["low"]["virtual"] == 2


class FitInTurn(mlo.Problem):
    """Follows the top at its even steps only."""

    def loss(self, batch, top):
        return (self() - (0.0 if self.steps_taken % 2 else top())).pow(2).sum()


@pytest.mark.parametrize("estimator", ["one_step", "unrolled", "cg", "darts"])
def test_a_lower_loss_may_read_the_top_at_some_steps_only(estimator):
    fit, judged = Weight(2.0, -3.0), Weight(0.5, 0.7)
    sgd = torch.optim.SGD(fit.parameters(), lr=LR)
    problems = [
        FitInTurn("fit", module=fit, optimizer=sgd, sometimes="top"),
        Judge("top", module=judged, optimizer=torch.optim.SGD(judged.parameters(), lr=LR)),
    ]
    found = mlo.Engine(problems, estimator, lookahead=False, device="cpu")
    for turn in range(2):
        direct, reads = 0.2 * judged.w.detach(), turn == 0
        stepped = fit.w.detach() - 2 * LR * (fit.w.detach() - reads * judged.w.detach())
        through = 2 * (stepped - 1) * (1.0 if estimator == "cg" else 2 * LR)
        torch.testing.assert_close(upper(found), direct + reads * through)
        found.step()


def test_a_top_that_nothing_reaches_at_a_step_stays_as_it_is():
    class Only(mlo.Problem):
        def loss(self, batch, fit):
            return (fit() - 1).pow(2).sum()

    fit, judged = Weight(2.0, -3.0), Weight(0.5, 0.7)
    problems = [
        FitInTurn("fit", module=fit, optimizer=torch.optim.SGD(fit.parameters(), lr=LR), sometimes="top"),
        Only("top", module=judged, optimizer=torch.optim.SGD(judged.parameters(), lr=LR)),
    ]
    found = mlo.Engine(problems, "one_step", device="cpu")
    found.step()
    before = judged.w.detach().clone()
    assert not torch.equal(before, Weight(0.5, 0.7).w)
    found.step()
    assert torch.equal(judged.w, before)
    assert found.problems["top"].steps_taken == 2
