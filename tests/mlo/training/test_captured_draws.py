"""Captured rounds of losses that draw random numbers, here from an emulated generator of a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recorded_levels import WARM_CG, Fit, Noisy, engines, levels, noisy_levels, run_both
from replaying import Drawing, assert_same
from torch import Tensor, nn
from torch.optim import SGD

import mlo
from mlo.ops import torch_versions

pytestmark = pytest.mark.usefixtures("as_on_gpu")


def same_numbers(plain: mlo.Engine, captured: mlo.Engine, rounds: int, seed: int = 3) -> None:
    """Both runs draw from the same state on, and leave the same one."""
    ends = []
    for engine in (plain, captured):
        Drawing.default.set_state(torch.tensor([seed, 0]))
        with Drawing():
            engine.run(rounds)
        ends.append(Drawing.default.get_state())
    assert ends[0].tolist() == ends[1].tolist()
    assert ends[0][1] > 0


KINDS: list[Any] = [
    {"kind": "one_step", "product": "one_sided"},
    {"kind": "one_step", "product": "forward"},
    "sama",
    {"kind": "truncated", "steps": 2},
    {"kind": "unrolled", "graph_memory": 0.0, "every": 2},
    WARM_CG,
    {"kind": "nystrom", "rank": 2, "damping": 1.0},
    {"kind": "penalty", "steps": 2},
]


@pytest.mark.parametrize("kind", ["darts", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS)], ids=str)
@pytest.mark.parametrize("low", [{"steps": 3}, {"clip_norm": 0.5, "accumulate": 2}], ids=str)
def test_a_replayed_round_draws_the_numbers_of_a_usual_one(kind: Any, low: dict[str, Any]) -> None:
    plain, captured = engines(partial(noisy_levels, **low), kind)
    same_numbers(plain, captured, 7)
    assert_same(plain, captured)
    assert captured.report().replayed == 3


@pytest.mark.slow
def test_with_lookahead_virtual_and_real_steps_draw_the_same_numbers() -> None:
    plain, captured = engines(noisy_levels, "unrolled", lookahead=True)
    same_numbers(plain, captured, 7)
    assert_same(plain, captured)
    assert captured.report().replayed == 3


class Masked(mlo.Problem):
    """A quadratic with dropout of its residuals, in a gradient that is the same for every point of its own."""

    def loss(self, batch: Tensor, top: mlo.Problem) -> Tensor:
        masked = F.dropout(self.params["weight"] - top.params["weight"].sin(), 0.5)
        return masked.square().sum() + 0.1 * (batch * self.params["weight"]).pow(4).sum()


class MaskedJudge(mlo.Problem):
    def loss(self, batch: Tensor, low: mlo.Problem) -> Tensor:
        return (F.dropout(low.params["weight"], 0.5) - batch).square().sum()


def masked_levels() -> list[mlo.Problem]:
    torch.manual_seed(0)
    low, top = nn.Linear(4, 5, bias=False).double(), nn.Linear(4, 5, bias=False).double()
    data = [torch.randn(5, 4).double() for _ in range(3)]
    return [
        Masked("low", module=low, optimizer=SGD(low.parameters(), 0.05), data=data),
        MaskedJudge("top", module=top, optimizer=SGD(top.parameters(), 0.1), data=data[::-1]),
    ]


@pytest.mark.parametrize("kind", ["unrolled", {"kind": "one_step", "product": "forward"}], ids=str)
def test_the_hypergradient_of_a_replay_is_exact_at_the_numbers_that_it_drew(kind: Any) -> None:
    _, engine = engines(masked_levels, kind)
    low, top = (engine.problems[name].module.weight for name in ("low", "top"))
    hypergradients = []
    with Drawing():
        engine.run(3)
        for _ in range(3):
            w, x = low.detach().clone(), top.detach().clone().requires_grad_()
            batch, judged = engine.problems["low"].stream.peek(), engine.problems["top"].stream.peek()
            begin = Drawing.default.get_state()
            mask, other = (F.dropout(torch.ones_like(w), 0.5) for _ in range(2))
            Drawing.default.set_state(begin)
            gradient = 2 * mask * mask * (w - x.sin()) + 0.4 * batch.pow(4) * w.pow(3)
            loss = (other * (w - 0.05 * gradient) - judged).square().sum()
            exact = torch.autograd.grad(loss, x)[0]
            engine.step()
            torch.testing.assert_close((x - top) / 0.1, exact, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(engine.losses["top"], loss, rtol=1e-12, atol=0)
            hypergradients.append(exact)
    assert engine.report().replayed == 3
    for one, another in pairwise(hypergradients):
        assert not torch.equal(one == 0, another == 0)  # each round has its own mask


def test_a_resumed_run_draws_the_numbers_that_would_have_come(tmp_path: Path) -> None:
    plain, captured = engines(noisy_levels, "one_step")
    same_numbers(plain, captured, 6)
    mlo.checkpoint.save(tmp_path / "state", captured.state_dict())
    _, resumed = engines(noisy_levels, "one_step")
    with Drawing():
        plain.run(6)
        resumed.load_state_dict(mlo.checkpoint.load(tmp_path / "state"))
        resumed.run(6)
    torch.testing.assert_close(resumed.losses, plain.losses, rtol=1e-11, atol=1e-13)
    assert resumed.report().replayed == 3


def test_a_usual_round_between_replays_and_a_new_seed_change_the_numbers_as_without_capture() -> None:
    def seeded(engine: mlo.Engine) -> None:
        if engine.rounds == 8:
            Drawing.default.set_state(torch.tensor([17, 400]))

    runs = engines(partial(levels, Noisy, last=4), "one_step")  # each seventh batch is smaller
    for engine in runs:
        Drawing.default.set_state(torch.tensor([3, 0]))
        with Drawing():
            engine.run(12, [seeded])
    assert_same(*runs)
    assert runs[1].report().replayed == 6


def test_a_torch_that_cannot_record_draws_captures_losses_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_versions, "RECORDS_DRAWS", False)
    plain, captured = engines(noisy_levels, "darts")
    why = f"a loss draws random numbers, which torch {torch.__version__} cannot record; install torch 2.10"
    with pytest.warns(UserWarning, match=re.escape(why)):
        same_numbers(plain, captured, 5)
    assert_same(plain, captured)
    assert captured.report().replayed == 0
    plain, captured = engines(levels, "one_step")
    run_both(plain, captured)
    assert_same(plain, captured)
    assert captured.report().replayed == 2


class NoisyAhead(Fit):
    """Draws in virtual steps only."""

    def loss(self, batch: Any, top: mlo.Problem) -> Tensor:
        x, y = batch
        return super().loss((F.dropout(x, 0.5) if self.looking_ahead else x, y), top)


@pytest.mark.parametrize(
    ("make", "kind"),
    [(levels, {"kind": "nystrom", "rank": 2, "damping": 1.0}), (partial(levels, NoisyAhead), "darts")],
    ids=["nystrom", "virtual steps only"],
)
def test_draws_that_leave_the_random_state_as_it_was(make: Callable[[], list[mlo.Problem]], kind: Any) -> None:
    plain, captured = engines(make, kind)
    for engine in (plain, captured):
        Drawing.default.set_state(torch.tensor([3, 40]))
        with Drawing():
            engine.run(8)
        assert Drawing.default.get_state().tolist() == [3, 40]
    assert_same(plain, captured)
    assert captured.report().replayed == 4
