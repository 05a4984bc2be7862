"""Rounds that are recorded and replayed give what usual rounds give; here by tests.replaying, on the CPU."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recorded_levels import WARM_CG, Fit, engines, levels, run_both
from replaying import assert_same, record
from torch import Tensor, nn

import mlo
from mlo.ops.rng import seed_everything
from mlo.training import engine as engine_module
from mlo.training.captured import Captured

ROUNDS = 9
KINDS: list[Any] = [
    "darts",
    "one_step",
    {"kind": "one_step", "product": "one_sided"},
    {"kind": "one_step", "product": "forward"},
    "sama",
    {"kind": "truncated", "steps": 2},
    "unrolled",
    {"kind": "unrolled", "graph_memory": 0.0, "every": 2},
    WARM_CG,
    {"kind": "neumann", "terms": 3},
    {"kind": "penalty", "steps": 2},
]


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("low", [{"steps": 3}, {"clip_norm": 0.5, "accumulate": 2}], ids=str)
def test_replayed_rounds_are_the_same(kind: Any, low: dict[str, Any]) -> None:
    plain, captured = engines(partial(levels, **low), kind)
    for _ in range(ROUNDS):
        plain.step()
        captured.step()
        torch.testing.assert_close(captured.losses, plain.losses, rtol=1e-11, atol=1e-13)
    assert_same(plain, captured)
    assert captured.report().replayed == ROUNDS - 4  # one before the momentum, two as usual, and the recorded one


@pytest.mark.usefixtures("as_on_gpu")
def test_a_batch_of_another_shape_is_taken_as_usual_and_the_recording_is_kept() -> None:
    plain, captured = engines(partial(levels, last=4), "one_step")
    run_both(plain, captured, 15)
    assert_same(plain, captured)
    assert captured.report().replayed == 7  # the fifth, sixth, and ninth to thirteenth


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("what", ["option", "attribute", "mode", "buffer", "state", "TF32"])
def test_a_change_of_what_a_recording_holds_fixed_is_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, captured = engines(levels, "one_step")
    run_both(plain, captured)
    replayed = captured.report().replayed
    for engine in (plain, captured):
        low = engine.problems["low"]
        if what == "option":
            low.optimizer.param_groups[0]["weight_decay"] = 0.1
        elif what == "attribute":
            low.factor = 2.0
        elif what == "mode":
            low.module[1].eval()
        elif what == "buffer":
            low.module[1].running_mean = low.module[1].running_mean + 1.0
        elif what == "TF32":
            monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        else:  # the optimizer's tensors are new ones then
            engine.load_state_dict(copy.deepcopy(engine.state_dict()))
    run_both(plain, captured)
    assert_same(plain, captured)
    assert captured.report().replayed == replayed + 3


@pytest.mark.usefixtures("as_on_gpu")
def test_a_loss_that_is_not_finite_is_reported_and_leaves_the_state_before_it() -> None:
    plain, captured = engines(levels, "one_step")
    for engine in (plain, captured):
        engine.run(6)
        engine.problems["low"].stream.peek(1)[0].fill_(float("nan"))
        with pytest.raises(mlo.NonFiniteLossError, match="'low': its loss is nan at its step 8"):
            engine.run(3)
    assert captured.report().replayed >= 3
    for one, other in zip(plain.problems.values(), captured.problems.values(), strict=True):
        torch.testing.assert_close(other.module.state_dict(), one.module.state_dict(), rtol=1e-11, atol=1e-13)


@pytest.mark.usefixtures("as_on_gpu")
def test_a_resumed_run_goes_on_as_it_was(tmp_path: Path) -> None:
    plain, captured = engines(levels, "one_step")
    run_both(plain, captured)
    mlo.checkpoint.save(tmp_path / "state", captured.state_dict())
    _, resumed = engines(levels, "one_step")
    resumed.load_state_dict(mlo.checkpoint.load(tmp_path / "state"))
    plain.run(6)
    resumed.run(6)
    torch.testing.assert_close(resumed.losses, plain.losses, rtol=1e-11, atol=1e-13)
    assert resumed.report().replayed == 3


class Noisy(Fit):
    def loss(self, batch: Any, top: mlo.Problem) -> Tensor:
        x, y = batch
        return super().loss((x + 0.1 * torch.randn_like(x), y), top)


class NoisyByNumpy(Fit):
    def loss(self, batch: Any, top: mlo.Problem) -> Tensor:
        return super().loss(batch, top) * np.random.rand()


class NoisyByPython(Fit):
    def loss(self, batch: Any, top: mlo.Problem) -> Tensor:
        return super().loss(batch, top) * random.random()


class Annealed(Fit):
    def loss(self, batch: Any, top: mlo.Problem) -> Tensor:
        return super().loss(batch, top) * 0.9**self.steps_taken


class InTurn(Fit):
    def loss(self, batch: Any, top: mlo.Problem) -> Tensor:
        return super().loss(batch, top) * (1 + self.step_in_round)


@pytest.mark.usefixtures("as_on_gpu")
def test_a_loss_may_ask_which_step_of_its_round_it_is() -> None:
    plain, captured = engines(partial(levels, InTurn, steps=3), "unrolled")
    run_both(plain, captured)
    assert_same(plain, captured)
    assert captured.report().replayed == 2


def with_adam() -> list[mlo.Problem]:
    problems = levels()
    problems[1].optimizer = torch.optim.Adam(problems[1].module.parameters(), 0.01)
    return problems


class Signed(torch.optim.SGD):
    pass


def with_subclass() -> list[mlo.Problem]:
    problems = levels()
    problems[1].optimizer = Signed(problems[1].module.parameters(), 0.01)
    return problems


def with_replaced_step() -> list[mlo.Problem]:
    problems = levels()
    optimizer = problems[1].optimizer
    own = optimizer.step
    optimizer.step = lambda: (nn.utils.clip_grad_norm_(problems[1].module.parameters(), 1e-3), own())[1]
    return problems


def with_hook(when: str, cls: type[Fit] = Fit) -> list[mlo.Problem]:
    problems = levels(cls)
    if when == "gradient":
        next(problems[0].module.parameters()).register_hook(lambda g: 0.5 * g)
    else:
        getattr(problems[1].optimizer, f"register_step_{when}_hook")(lambda *_: None)
    return problems


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (partial(levels, Noisy), "a loss draws random numbers on the CPU"),
        (partial(levels, NoisyByNumpy), "a loss draws random numbers on the CPU"),
        (partial(levels, NoisyByPython), "a loss draws random numbers on the CPU"),
        (partial(levels, Annealed), "the loss of 'low' asks for steps_taken"),
        (with_adam, "Adam of 'top' counts its steps on the CPU; make it with capturable=True"),
        (with_subclass, "Signed of 'top' may read values on the CPU; it has no capturable=True"),
        (with_replaced_step, "SGD of 'top' may read values on the CPU"),
        (partial(with_hook, "pre"), "'top' has hooks"),
        (partial(with_hook, "post"), "'top' has hooks"),
        (partial(with_hook, "gradient"), "'low' has hooks"),
        (partial(with_hook, "post", Noisy), "a loss draws random numbers on the CPU"),  # only the first reason is given
        (partial(levels, autocast=torch.float16), "the loss scale of 'low', for float16, depends on values"),
    ],
)
def test_what_cannot_be_recorded_is_said_once_and_runs_as_usual(
    make: Callable[[], list[mlo.Problem]], why: str
) -> None:
    torch.manual_seed(1)
    plain, captured = engines(make, "one_step")
    seed_everything(2)
    plain.run(6)
    seed_everything(2)
    with pytest.warns(UserWarning, match=f"rounds are not captured: {why}") as warned:
        captured.run(6)
    assert len(warned) == 1
    assert_same(plain, captured)
    assert captured.report().replayed == 0
    assert why in str(captured.report())


@pytest.mark.usefixtures("as_on_gpu")
def test_a_recording_that_fails_leaves_all_counters_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(function: Callable[[], None]) -> Callable[[], None]:
        record(lambda: None)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(engine_module, "Captured", partial(Captured, record=fails))
    plain, captured = engines(levels, "one_step")
    plain.run(6)
    with pytest.warns(UserWarning, match="a round cannot be recorded: operation not permitted"):
        captured.run(6)
    assert_same(plain, captured)


@pytest.mark.usefixtures("as_on_gpu")
def test_changes_at_every_round_are_named() -> None:
    def counted(engine: mlo.Engine) -> None:
        engine.problems["low"].factor += 0.01

    _, captured = engines(levels, "one_step")
    with pytest.warns(UserWarning, match="no round is replayed, because of changes: attributes of 'low'"):
        captured.run(25, [counted])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"capture=True needs a CUDA GPU, and the device is 'cpu'; pass capture=False"),
        ({"capture": "yes"}, r"capture='yes'; pass True or False"),
    ],
)
def test_capture_is_refused_where_it_cannot_be_before_anything_is_moved(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(engine_module, "move_to")
    with pytest.raises(mlo.ConfigError, match=message):
        mlo.Engine(levels(), "one_step", device="cpu", **({"capture": True} | options))
