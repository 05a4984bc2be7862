"""Autocast: steps in bfloat16, curvature products in the precision of their own choice."""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from brute_force import brute_force, small_lbt
from engine_state import same
from small_lbt import noisy_lbt
from torch import Tensor, nn
from two_levels import Judging

import mlo
from mlo.ops.loss_scale import GROWTH_INTERVAL, LossScale
from mlo.steps.level import Level


def stack(autocast: torch.dtype | None) -> list[mlo.Problem]:
    problems = small_lbt("momentum", autocast=autocast)
    mlo.Engine(problems, "one_step", device="cpu").run(2)
    return problems


@pytest.mark.parametrize(("autocast", "bound"), [(False, 0.03), (True, 0.1)])
def test_exact_products_stay_near_brute_force(autocast, bound):
    """The cotangents are bfloat16's own; double backward under autocast adds little to that."""
    problems = stack(torch.bfloat16)
    engine = mlo.Engine(
        problems, {"kind": "one_step", "product": {"kind": "exact", "autocast": autocast}}, device="cpu"
    )
    found, expected = engine.hypergradient("arch")["weights"], brute_force(problems)
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < bound


def test_a_difference_in_full_precision_beats_one_under_autocast():
    problems = stack(torch.bfloat16)
    expected = brute_force(problems)
    errors = {}
    for autocast in (False, True):
        product = {"kind": "central", "radius": 0.01, "autocast": autocast}
        engine = mlo.Engine(problems, {"kind": "one_step", "product": product}, device="cpu")
        errors[autocast] = (engine.hypergradient("arch")["weights"] - expected).norm() / expected.norm()
    assert errors[False] < 0.05
    assert errors[True] > 3 * errors[False]


def test_steps_are_taken_in_bfloat16():
    losses = []
    for autocast in (None, torch.bfloat16):
        problems = small_lbt("momentum", autocast=autocast)
        engine = mlo.Engine(problems, "one_step", device="cpu")
        engine.step()
        losses.append(engine.losses["teacher"].item())
        assert problems[0].module.head.weight.dtype == torch.float32
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"graph_memory": 0.0}, {"product": "central"}, {"kind": "cg"}], ids=str)
def test_an_autocast_around_an_engine_does_not_reach_into_it(options, autocast, lookahead):
    """Neither losses nor their gradients, nor the pullback of several virtual steps in one graph."""

    def taken(around: AbstractContextManager[object]) -> object:
        problems = small_lbt("momentum", steps=4, autocast=autocast)
        engine = mlo.Engine(problems, {"kind": "unrolled", **options}, lookahead=lookahead, device="cpu")
        with around:
            engine.run(3)
            found = engine.hypergradient("arch")["weights"], engine.objective("arch"), dict(engine.losses)
        return found, [dict(problem.module.state_dict()) for problem in problems]

    expected = taken(nullcontext())
    for kind, enabled in (("cpu", True), ("cpu", False), ("cuda", False)):
        assert same(taken(torch.autocast(kind, torch.bfloat16, enabled=enabled)), expected), (kind, enabled)


def test_no_cast_of_a_weight_outlives_its_step():
    """Torch keeps casts for the time of the outermost autocast: a user's call's for a step, a step's for a call."""
    losses = []
    for around in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        problems, images = small_lbt("momentum"), torch.ones(2, 5)
        problems[2].autocast = torch.bfloat16  # its loss alone is cast, and reads the others after their steps
        engine, student = mlo.Engine(problems, "one_step", lookahead=False, device="cpu"), problems[1].module
        with around:
            student(images)
            engine.step()
            losses.append(dict(engine.losses))
            with torch.no_grad():
                student[0].weight.mul_(2)
            found = student(images)
            torch.clear_autocast_cache()
            assert torch.equal(found, student(images))
    assert same(*losses)


def halves(factor: float, **problem: object) -> list[mlo.Problem]:
    """The small LBT with the lower losses multiplied, in float16."""
    problems = small_lbt("sgd", autocast=torch.float16, **problem)
    for low in problems[:2]:
        loss = low.loss
        low.loss = lambda *args, loss=loss, **reads: factor * loss(*args, **reads)
        low.optimizer.param_groups[0]["lr"] /= factor
    return problems


@pytest.mark.parametrize("estimator", ["one_step", "unrolled", {"kind": "unrolled", "every": 2}, "darts"], ids=str)
@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e4, 1e7])
def test_float16_gradients_neither_vanish_nor_overflow(factor, estimator):
    """They would: a loss of a millionth has gradients below float16's least, one of 10,000 above its greatest."""
    problems = halves(factor, steps=2)
    engine = mlo.Engine(problems, estimator, device="cpu")
    expected, found = brute_force_of(factor, problems), engine.hypergradient("arch")["weights"]
    assert (found - expected).norm() < 0.05 * expected.norm()
    engine.run(3)
    assert all(p.isfinite().all() for problem in problems for p in problem.variables.values())
    scale = engine.report().problems["teacher"].loss_scale
    assert scale == 2.0**16 if factor < 1 else scale < 2.0**16 if factor > 1 else True


def test_an_overflow_is_computed_again_with_the_same_random_numbers():
    """The gradient at half the scale is that of the same dropout, and so are the products at it."""
    drawn: list[float] = []

    class Noisy(mlo.Problem):
        def loss(self, batch, top):
            noise = torch.rand(())
            drawn.append(noise.item())
            return (1e4 * noise * (self(batch) - top(batch)).float().square()).mean()

    torch.manual_seed(0)
    one, two, data = nn.Linear(3, 2), nn.Linear(3, 2), [torch.randn(4, 3)]
    sgd = torch.optim.SGD(one.parameters(), lr=1e-9)
    low = Noisy("low", module=one, optimizer=sgd, data=data, autocast=torch.float16)
    top = Judging("top", module=two, optimizer=torch.optim.SGD(two.parameters(), lr=0.1), data=data)
    mlo.Engine([low, top], "one_step", device="cpu").step()
    assert len(drawn) > 2, "it overflowed"
    assert len(set(drawn)) == 1


def brute_force_of(factor: float, problems: list[mlo.Problem]) -> torch.Tensor:
    """Plain SGD steps do not know of a factor that the learning rate undoes."""
    for low in problems[:2]:
        low.optimizer.param_groups[0]["lr"] *= factor
    found = brute_force(problems)
    for low in problems[:2]:
        low.optimizer.param_groups[0]["lr"] /= factor
    return found


def scales_of(engine: mlo.Engine) -> dict[str, object]:
    return {name: level["scale"] for name, level in engine.state_dict()["levels"].items()}


def test_the_scale_grows_after_many_passes_and_is_part_of_the_state():
    scale = LossScale(2.0, GROWTH_INTERVAL - 1)
    assert scale.accepts([torch.ones(3)])
    assert scale == LossScale(4.0, 0)
    scale.passes = 7
    assert not scale.accepts([torch.ones(3), torch.tensor([torch.inf])])
    assert scale == LossScale(2.0, 0)
    engine = mlo.Engine(halves(1e4), "one_step", device="cpu")
    before = scales_of(engine)
    engine.hypergradient("arch")
    assert scales_of(engine) == before
    engine.run(2)
    resumed = mlo.Engine(halves(1e4), "one_step", device="cpu")
    resumed.load_state_dict(engine.state_dict())
    (value, passes), scales = scales_of(engine)["teacher"], scales_of(resumed)
    assert scales == scales_of(engine)
    assert (resumed.report().problems["teacher"].loss_scale, passes) == (value, 2)


def test_a_step_that_is_recomputed_has_the_scale_that_it_was_taken_with():
    found = []
    for every in (1, 3):
        problems = halves(1e-6, steps=3)
        engine = mlo.Engine(problems, {"kind": "unrolled", "every": every}, device="cpu")
        engine.run(2)
        found.append(engine.hypergradient("arch")["weights"])
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


def test_a_pass_that_is_repeated_draws_the_same_numbers():
    """The result is as if the scale had been right at the first attempt."""

    def trained(scale: float) -> dict[str, torch.Tensor]:
        problems = noisy_lbt()
        for low in problems[:2]:
            low.autocast = torch.float16
        engine = mlo.Engine(problems, "one_step", device="cpu")
        state = engine.state_dict()
        for low in problems[:2]:
            state["levels"][low.name]["scale"] = [scale, 0]
        engine.load_state_dict(state)
        torch.manual_seed(1)
        engine.step()
        assert (engine.report().problems["teacher"].loss_scale < scale) == (scale == 2.0**40), "it overflowed"
        return {name: problem.module.state_dict() for name, problem in engine.problems.items()}

    torch.testing.assert_close(trained(2.0**40), trained(2.0**8), rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_not_finite_raises_and_is_not_repeated_for_ever():
    problems = halves(1.0)
    problems[0].stream.peek()[0].fill_(torch.inf)
    with pytest.raises(mlo.NonFiniteLossError, match="teacher"):
        mlo.Engine(problems, "one_step", device="cpu").step()


def test_products_under_float16_are_refused():
    options = {"kind": "one_step", "product": {"kind": "central", "autocast": True}}
    with pytest.raises(mlo.ConfigError, match="'teacher': curvature products under float16 would underflow"):
        mlo.Engine(halves(1.0), options, device="cpu")


class Watched(mlo.Problem):
    """Notes in which precision its module computes, by the kind of the pass."""

    def __init__(self, name: str, module: nn.Module, seen: dict, autocast: torch.dtype | None, **options: object):
        sgd, data = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9), [torch.randn(4, 3) for _ in range(8)]
        super().__init__(name, module=module, optimizer=sgd, data=data, autocast=autocast, **options)
        self.seen = seen

    def noted(self, batch: Tensor) -> Tensor:
        output = self(batch)
        self.seen[self.name].append(output.dtype)
        return output


class Low(Watched):
    def loss(self, batch, mid, top):
        own = self.noted(batch)
        return (own - mid(batch)).float().square().mean() + (own * top(batch)).float().sin().mean()


class Mid(Watched):
    def loss(self, batch, low, top):
        own = self.noted(batch)
        return (own - low(batch)).float().square().mean() + (own * top(batch)).float().sin().mean()


class Top(Watched):
    def loss(self, batch, mid, low):
        self.noted(batch)
        return (mid(batch) * low(batch)).float().square().mean()


HALF, FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("inner_path", [False, True])
@pytest.mark.parametrize("in_products", [False, True])
@pytest.mark.parametrize("product", ["exact", "one_sided"])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.filterwarnings("ignore:the gradient of 'mid' itself runs through 'low'")
def test_every_kind_of_pass_is_under_its_own_autocast(every, product, in_products, inner_path, accumulate, monkeypatch):
    """Real, virtual and recomputed steps use the autocast of the problem; products use their own option."""
    own: dict[str, list[torch.dtype]] = defaultdict(list)
    seen: dict[tuple[str, str], set[torch.dtype]] = defaultdict(set)
    count = Level.count

    def counted(self: Level, kind: str, calls: list[int]) -> None:
        seen[self.name, kind].add(own[self.name].pop())
        count(self, kind, calls)

    monkeypatch.setattr(Level, "count", counted)
    torch.manual_seed(0)
    stack = [
        Low("low", nn.Linear(3, 2), own, HALF, steps=3, accumulate=accumulate),
        Mid("mid", nn.Linear(3, 2), own, HALF, accumulate=accumulate),
        Top("top", nn.Linear(3, 2), own, None),
    ]
    options = {"kind": "unrolled", "every": every, "product": {"kind": product, "autocast": in_products}}
    for lookahead in (False, True):
        engine = mlo.Engine(stack, options, lookahead=lookahead, inner_path=inner_path, device="cpu")
        engine.run(2)
    expected = HALF if in_products else FULL
    expected = {
        **{(name, kind): {HALF} for name in ("low", "mid") for kind in ("step", "virtual")},
        ("low", "product"): {expected, HALF} if inner_path else {expected},  # its steps are part of the loss of mid
        ("mid", "product"): {expected},
        ("top", "step"): {FULL},
    }
    if every == 2:
        expected["low", "recompute"] = {HALF}
    assert seen == expected


class Small(mlo.Problem):
    def loss(self, batch, mid):
        return 1e-7 * (self(batch) - mid(batch)).float().square().mean()


class Turned(mlo.Problem):
    def loss(self, batch, low, top):
        return (low(batch) * top(batch)).float().mean() + self(batch).float().square().mean()


class Farther(mlo.Problem):
    def loss(self, batch, mid):
        return mid(batch).float().square().mean()


def test_gradients_on_an_inner_path_do_not_vanish_in_float16():
    found = []
    for autocast in (None, torch.float16):
        torch.manual_seed(0)
        data, stack = [torch.randn(4, 3)], []
        for cls, name, rate in ((Small, "low", 1e6), (Turned, "mid", 1.0), (Farther, "top", 1.0)):
            module = nn.Linear(3, 2)
            optimizer = torch.optim.SGD(module.parameters(), lr=rate)
            stack.append(cls(name, module=module, optimizer=optimizer, data=data, autocast=autocast))
        engine = mlo.Engine(stack, "one_step", inner_path=True, device="cpu")
        found.append(engine.hypergradient("top")["weight"])
    assert (found[1] - found[0]).norm() < 0.02 * found[0].norm()


class Tiny(mlo.Problem):
    def loss(self, batch, low, top):
        return 1e-7 * (low(batch).float().square().mean() + (self(batch) * top(batch)).float().mean())


class Toward(mlo.Problem):
    def loss(self, batch, mid):
        return (self(batch) - mid(batch)).square().mean()


@pytest.mark.filterwarnings("ignore:the gradient of 'mid' itself runs through 'low'")
def test_cotangents_of_lower_problems_do_not_vanish_in_float16():
    """Those of their outputs would, without the loss scale."""
    moved = []
    for autocast in (None, torch.float16):
        torch.manual_seed(0)
        data, stack = [torch.randn(4, 3)], []
        for cls, name, rate in ((Toward, "low", 0.5), (Tiny, "mid", 1e7), (Farther, "top", 1.0)):
            module = nn.Linear(3, 2)
            optimizer = torch.optim.SGD(module.parameters(), lr=rate)
            given = autocast if name == "mid" else None
            stack.append(cls(name, module=module, optimizer=optimizer, data=data, autocast=given))
        before = stack[1].module.weight.detach().clone()
        engine = mlo.Engine(stack, {"kind": "one_step", "product": "central"}, lookahead=False, device="cpu")
        engine.step()
        moved.append(stack[1].module.weight.detach() - before)
    assert (moved[1] - moved[0]).norm() < 0.02 * moved[0].norm()
