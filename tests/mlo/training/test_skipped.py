"""Rounds that are skipped because something in them is not finite: all but the batches is as before them."""

from __future__ import annotations

import copy

import pytest
import torch
from engine_state import same
from recorded_levels import Fit, Judge, network

import mlo
from mlo.training.skipped import MOST_IN_A_ROW

STEPS, ROUNDS, BAD = 2, 6, 3
WARM = {"kind": "cg", "warm_start": True}
REST = ("one_step", "neumann", "truncated", "unrolled", "sama", "first_order", "nystrom")
NAN, INF = float("nan"), float("inf")


def batches(seed: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    chances = torch.Generator().manual_seed(seed)
    make = torch.float64
    return [tuple(torch.randn(6, n, generator=chances, dtype=make) for n in (3, 2)) for _ in range(count)]


def levels(low_data, top_data, captured) -> list[mlo.Problem]:
    torch.manual_seed(0)
    low, top = network(), torch.nn.Linear(1, 2, bias=False).double()
    sgd = torch.optim.SGD(low.parameters(), 0.1, momentum=0.9)
    upper = torch.optim.SGD(top.parameters(), 0.05, 0.5) if captured else torch.optim.Adam(top.parameters(), 0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.9)
    return [
        Fit("low", module=low, optimizer=sgd, data=low_data, steps=STEPS, scheduler=schedule),
        Judge("top", module=top, optimizer=upper, data=top_data),
    ]


def engine_on(low_data, top_data, estimator="one_step", **options):
    return mlo.Engine(levels(low_data, top_data, "capture" in options), estimator, device="cpu", **options)


def trained(engine) -> object:
    return copy.deepcopy(
        [
            [
                *(problem.module.state_dict(), problem.optimizer.state_dict(), problem.steps_taken),
                *(problem.scheduler and problem.scheduler.state_dict(), [p.grad for p in problem.module.parameters()]),
            ]
            for problem in engine.problems.values()
        ]
        + [engine.state_dict()[part] for part in ("losses", "warm", "reports")]
    )


@pytest.mark.parametrize("how", ["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("estimator", ["darts", WARM, *[pytest.param(name, marks=pytest.mark.slow) for name in REST]])
@pytest.mark.parametrize("bad", ["first lower step", "last lower step", "upper step", "infinity"])
def test_a_skipped_round_leaves_nothing_but_other_batches(request, how, estimator, bad):
    if how == "as on a GPU":
        request.getfixturevalue("as_on_gpu")
    low_data, top_data = batches(0, STEPS * ROUNDS), batches(1, ROUNDS)
    spoiled = copy.deepcopy((low_data, top_data))
    data, at = {
        "first lower step": (spoiled[0], STEPS * BAD),
        "last lower step": (spoiled[0], STEPS * BAD + STEPS - 1),
        "upper step": (spoiled[1], BAD),
        "infinity": (spoiled[0], STEPS * BAD),
    }[bad]
    data[at][1][0] = INF if bad == "infinity" else NAN
    good = engine_on(
        low_data[: STEPS * BAD] + low_data[STEPS * (BAD + 1) :], top_data[:BAD] + top_data[BAD + 1 :], estimator
    )
    good.run(ROUNDS - 1)
    skipping = engine_on(*spoiled, estimator, non_finite="skip")
    skipping.run(BAD)
    before = trained(skipping)
    skipping.step()
    assert same(trained(skipping), before)
    assert skipping.metrics()["skipped_rounds"] == 1
    skipping.run(ROUNDS - BAD - 1)
    assert same(trained(skipping), trained(good))
    assert skipping.rounds == ROUNDS
    assert skipping.metrics()["skipped_rounds"] == 1


@pytest.mark.usefixtures("as_on_gpu")
def test_captured_rounds_are_skipped():
    low_data, top_data = batches(0, STEPS * 20), batches(1, 20)
    spoiled = copy.deepcopy((low_data, top_data))
    bad = 10
    spoiled[0][STEPS * bad][0].fill_(NAN)
    rest = low_data[: STEPS * bad] + low_data[STEPS * (bad + 1) :], top_data[:bad] + top_data[bad + 1 :]
    engines = engine_on(*rest, capture=True), engine_on(*spoiled, capture=True, non_finite="skip")
    engines[0].run(19)
    engines[1].run(20)
    assert engines[1]._captured.replayed > 5
    for one, other in zip(trained(engines[1]), trained(engines[0]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)  # replays use formulas for the steps of SGD


def test_a_bad_first_round_leaves_optimizers_without_state():
    low_data, top_data = batches(0, STEPS * 2), batches(1, 2)
    low_data[0][0].fill_(NAN)
    engine = engine_on(low_data, top_data, non_finite="skip")
    before = trained(engine)
    engine.step()
    assert same(trained(engine), before)
    engine.step()
    good = engine_on(low_data[STEPS:], top_data[1:])
    good.step()
    assert same(trained(engine), trained(good))


def test_too_many_bad_rounds_in_a_row_stop_the_training():
    low_data, top_data = batches(0, STEPS * 30), batches(1, 30)
    for x, _ in low_data[4:]:
        x.fill_(NAN)
    engine = engine_on(low_data, top_data, non_finite="skip")
    with pytest.raises(mlo.NonFiniteLossError, match=f"{MOST_IN_A_ROW} rounds in a row were skipped before it"):
        engine.run(30)
    assert engine.rounds == 2 + MOST_IN_A_ROW
    assert engine.metrics()["skipped_rounds"] == MOST_IN_A_ROW


def test_good_rounds_in_between_begin_the_count_again():
    low_data, top_data = batches(0, STEPS * 30), batches(1, 30)
    for number, (x, _) in enumerate(top_data):
        if number % 10:
            x.fill_(NAN)
    engine = engine_on(low_data, top_data, non_finite="skip")
    engine.run(30)
    assert engine.metrics()["skipped_rounds"] == 27


def test_the_counts_are_in_the_state(tmp_path):
    low_data, top_data = batches(0, STEPS * 30), batches(1, 30)
    for x, _ in low_data[4:]:
        x.fill_(NAN)
    engine = engine_on(low_data, top_data, non_finite="skip")
    engine.run(7)
    mlo.checkpoint.save(tmp_path / "state", engine.state_dict())
    resumed = engine_on(low_data, top_data, non_finite="skip")
    resumed.load_state_dict(mlo.checkpoint.load(tmp_path / "state"))
    assert resumed.metrics()["skipped_rounds"] == 5
    with pytest.raises(mlo.NonFiniteLossError):
        resumed.run(10)
    assert resumed.rounds == 2 + MOST_IN_A_ROW
    for wrong in ([1], [1, 2, 3], [-1, 0], 5, [1.0, 2], ["a", 0]):
        with pytest.raises(mlo.CheckpointError, match="skipped"):
            resumed.load_state_dict({**engine.state_dict(), "skipped": wrong})


def test_states_of_engines_that_skip_and_that_stop_are_exchanged():
    data = batches(0, STEPS * 4), batches(1, 4)
    for kinds in (("stop", "skip"), ("skip", "stop")):
        one, other = (engine_on(*data, non_finite=kind) for kind in kinds)
        one.run(2)
        other.load_state_dict(copy.deepcopy(one.state_dict()))
        other.run(1)
        one.run(1)
        assert same(trained(one), trained(other))


def test_another_policy_is_an_error():
    with pytest.raises(mlo.ConfigError, match="non_finite='ignore'; pass 'stop' or 'skip'"):
        engine_on(batches(0, 2), batches(1, 1), non_finite="ignore")
