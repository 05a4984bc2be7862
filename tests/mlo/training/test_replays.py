"""What changes between replays: schedulers, learning rates, batches, loaded states, usual rounds."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from recorded_levels import WARM_CG, Fit, Judge, engines, levels, run_both
from replaying import assert_same
from torch import Tensor, nn

import mlo
from mlo.levels.batches import open_stream
from mlo.training import captured as captured_module
from mlo.training import engine as engine_module
from mlo.training import recording
from mlo.training.captured import Captured


@pytest.mark.usefixtures("as_on_gpu")
def test_a_scheduler_does_not_move_in_replayed_rounds_before_its_problem_steps() -> None:
    def make() -> list[mlo.Problem]:
        problems = levels()
        problems[1].warmup = 7
        problems[1].scheduler = torch.optim.lr_scheduler.StepLR(problems[1].optimizer, 1, 0.5)
        return problems

    plain, captured = engines(make, "one_step")
    run_both(plain, captured, 13)
    assert_same(plain, captured)
    assert captured.report().replayed == 3 + 2  # before the first step of the top, and after it


class LateToAsk(Fit):
    def loss(self, batch: Any, top: mlo.Problem) -> Tensor:
        later = len(batch[0]) == 6 and self.step_number > 2
        return super().loss(batch, top) * (1.0 if not later else 0.9**self.steps_taken)


@pytest.mark.usefixtures("as_on_gpu")
def test_what_a_loss_asks_for_only_in_the_recorded_round_is_seen() -> None:
    plain, captured = engines(partial(levels, LateToAsk), "one_step")
    plain.run(6)
    with pytest.warns(UserWarning, match="the loss of 'low' asks for steps_taken"):
        captured.run(6)
    assert_same(plain, captured)
    assert captured.report().replayed == 0


@pytest.mark.usefixtures("as_on_gpu")
def test_a_learning_rate_in_a_tensor_is_read_at_every_round() -> None:
    def make() -> list[mlo.Problem]:
        problems = levels()
        for group in problems[1].optimizer.param_groups:
            group["lr"] = torch.tensor(0.05, dtype=torch.float64)
        return problems

    def halved(engine: mlo.Engine) -> None:
        engine.problems["top"].optimizer.param_groups[0]["lr"].mul_(0.5)

    plain, captured = engines(make, "one_step")
    plain.run(7, [halved])
    captured.run(7, [halved])
    assert_same(plain, captured)
    assert captured.report().replayed == 3


def without_momentum(**low: Any) -> list[mlo.Problem]:
    problems = levels(**low)
    for problem in problems:
        for group in problem.optimizer.param_groups:
            group["momentum"] = 0.0
    return problems


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize(("kind", "first"), [("one_step", 6), (WARM_CG, 6), (WARM_CG, 0)])
def test_a_state_loaded_between_replays_brings_its_learning_rates_and_warm_starts(kind: Any, first: int) -> None:
    plain, captured = engines(partial(without_momentum, steps=2), kind)
    for engine in (plain, captured):
        engine.run(first)
        before = copy.deepcopy(engine.state_dict())
        engine.run(10 - first)
        engine.load_state_dict(before)
        engine.run(4)
    assert_same(plain, captured)
    assert captured.report().replayed >= 6


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("kind", ["cg", "neumann"])
def test_a_replay_starts_from_the_solution_of_a_usual_round_before_it(kind: str) -> None:
    few = {"kind": kind, "warm_start": True} | ({"terms": 2} if kind == "neumann" else {"iterations": 2})
    plain, captured = engines(partial(levels, rate=0.02, last=4), few)
    run_both(plain, captured, 15)
    assert_same(plain, captured, rtol=1e-8)
    assert captured.report().replayed == 7


class LessMomentum(torch.optim.lr_scheduler.LambdaLR):
    """Sets another momentum after the fourth step, and then none."""

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        if self.last_epoch == 4:
            self.optimizer.param_groups[0]["momentum"] = 0.1


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize(("steps", "replayed"), [(1, 2), (2, 2), (4, 2)])
def test_a_scheduler_that_sets_more_than_learning_rates(steps: int, replayed: int) -> None:
    def make() -> list[mlo.Problem]:
        problems = levels(steps=steps)
        problems[0].scheduler = LessMomentum(problems[0].optimizer, lambda step: 0.9**step)
        return problems

    plain, captured = engines(make, "one_step")
    run_both(plain, captured, 9)
    assert_same(plain, captured)
    assert captured.report().replayed >= replayed


@pytest.mark.usefixtures("as_on_gpu")
def test_momentum_in_cycles_that_end_with_the_rounds_is_never_replayed() -> None:
    def make() -> list[mlo.Problem]:
        problems = levels(steps=2)
        problems[0].scheduler = torch.optim.lr_scheduler.CyclicLR(
            problems[0].optimizer, 0.05, 0.1, step_size_up=1, step_size_down=1, mode="triangular"
        )
        return problems

    plain, captured = engines(make, "one_step")
    plain.run(25)
    with pytest.warns(UserWarning, match="because of changes: options that the scheduler of 'low' sets"):
        captured.run(25)
    torch.testing.assert_close(captured.losses, plain.losses, rtol=1e-11, atol=1e-13)
    assert captured.report().replayed == 0


class Cloud:
    """A batch of a type that torch's pytrees do not know, and that cannot be compared."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("Boolean value of Tensor with more than one value is ambiguous")

    __hash__ = None  # type: ignore[assignment]


class Clouds(Fit):
    def loss(self, batch: Any, top: mlo.Problem) -> Tensor:
        cloud, weights, sparse = batch
        x, y = cloud.parts
        return super().loss((torch.sparse.mm(sparse, x) * float(weights[0]), y), top)


def with_clouds(count: int) -> list[mlo.Problem]:
    problems = levels(Clouds)
    parts = problems[1].stream.peek()
    data = [(Cloud(*parts), np.full(2, 1.0 + i), torch.eye(6).double().to_sparse()) for i in range(count)]
    problems[0].stream = open_stream(data, "low")
    return problems


@pytest.mark.usefixtures("as_on_gpu")
def test_what_is_not_a_dense_tensor_in_a_batch_must_stay_the_same() -> None:
    plain, captured = engines(partial(with_clouds, 1), "one_step")
    run_both(plain, captured)
    assert_same(plain, captured)
    assert captured.report().replayed == 2
    plain, captured = engines(partial(with_clouds, 30), "one_step")
    plain.run(25)
    with pytest.warns(UserWarning, match="no round is replayed, because of changes: batches of 'low'"):
        captured.run(25)
    assert_same(plain, captured)
    assert captured.report().replayed == 0


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.coarse = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.scalar = nn.Parameter(torch.ones(()))
        self.fine = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fine(x.float() * self.scalar).double() + 0.0 * self.coarse.float().sum()


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("on_device", [False, True])
def test_learning_rates_of_groups_of_several_dtypes_empty_groups_and_tensors(
    monkeypatch: pytest.MonkeyPatch, on_device: bool
) -> None:
    """As 0.1003 in bfloat16 is 0.1001, a rate of the first parameter's dtype would be seen."""
    if on_device:
        monkeypatch.setattr(recording, "readable", lambda tensor: False)

    def make() -> list[mlo.Problem]:
        problems = levels()
        torch.manual_seed(1)
        model = Mixed()
        rate = torch.tensor(0.1003) if on_device else 0.1003
        groups = [{"params": []}, {"params": model.parameters()}]
        sgd = torch.optim.SGD(groups, rate)
        schedule = torch.optim.lr_scheduler.StepLR(sgd, 1, 0.9)
        data = [problems[1].stream.peek(i) for i in range(7)]
        return [
            Fit("low", module=model, optimizer=sgd, scheduler=schedule, data=data, steps=2),
            Judge("top", module=problems[1].module, optimizer=problems[1].optimizer, data=data),
        ]

    plain, captured = engines(make, {"kind": "unrolled"})
    run_both(plain, captured, 8)
    for one, other in zip(plain.problems.values(), captured.problems.values(), strict=True):
        torch.testing.assert_close(other.module.state_dict(), one.module.state_dict(), rtol=2e-6, atol=2e-7)
    assert captured.report().replayed >= 4


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("error", [ValueError("boom"), RuntimeError("boom")])
def test_an_error_while_a_round_is_recorded_leaves_rates_and_schedulers(
    monkeypatch: pytest.MonkeyPatch, error: Exception, tensor: bool
) -> None:
    def fails(function: Callable[[], None]) -> Callable[[], None]:
        raise error

    def make() -> list[mlo.Problem]:
        problems = levels(steps=2)
        if tensor:
            problems[0].optimizer.param_groups[0]["lr"] = torch.tensor(0.1, dtype=torch.float64)
        return problems

    monkeypatch.setattr(engine_module, "Captured", partial(Captured, record=fails))
    plain, captured = engines(make, "one_step")
    captured.run(3)
    if isinstance(error, RuntimeError):  # the round is taken as usual
        plain.run(4)
        with pytest.warns(UserWarning, match="a round cannot be recorded: boom"):
            captured.run(1)
    else:
        plain.run(3)
        with pytest.raises(ValueError, match="boom"):
            captured.run(1)
    assert_same(plain, captured)


@pytest.mark.usefixtures("as_on_gpu")
def test_a_problem_that_begins_to_step_is_seen() -> None:
    def make() -> list[mlo.Problem]:
        problems = without_momentum()
        problems[1].warmup = 6
        return problems

    plain, captured = engines(make, "one_step")
    run_both(plain, captured, 12)
    assert_same(plain, captured)
    assert captured.report().replayed == 6


@pytest.mark.usefixtures("as_on_gpu")
def test_usual_rounds_between_replays_lead_to_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_module, "MOST_CHANGES", 5)
    _, captured = engines(partial(levels, last=4), "one_step")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured.run(40)
    assert captured.report().replayed == 26


@pytest.mark.usefixtures("as_on_gpu")
def test_a_parameter_that_is_frozen_between_replays_is_refused_as_usual() -> None:
    for engine in engines(levels, "one_step"):
        engine.run(6)
        engine.problems["low"].module[0].weight.requires_grad_(False)
        with pytest.raises(mlo.GraphError, match="no longer requires gradients"):
            engine.step()


@pytest.mark.usefixtures("as_on_gpu")
def test_an_optimizer_that_counts_its_steps_on_the_device_is_captured() -> None:
    def make() -> list[mlo.Problem]:
        problems = levels(steps=2)
        for problem in problems:
            problem.optimizer = torch.optim.Adam(problem.module.parameters(), 0.01, fused=True)
        problems[0].scheduler = torch.optim.lr_scheduler.StepLR(problems[0].optimizer, 1, 0.9)
        return problems

    plain, captured = engines(make, "one_step")
    run_both(plain, captured, 8)
    assert_same(plain, captured)
    assert captured.report().replayed == 4
    parameters = [nn.Parameter(torch.zeros(2))]
    assert captured_module._on_device(torch.optim.Adam(parameters, capturable=True))
    assert not captured_module._on_device(torch.optim.Adam(parameters))


def test_capture_is_refused_in_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    captured_module.refuse_capture(gpu)
    monkeypatch.setattr(captured_module.distributed, "world", lambda: 2)
    with pytest.raises(mlo.ConfigError, match="capture=True works in one process"):
        captured_module.refuse_capture(gpu)


class SignByKey(Fit):
    def loss(self, batch: Any, top: mlo.Problem) -> Tensor:
        ((sign, (x, y)),) = batch.items()
        return super().loss((x, y) if sign == "plus" else (-x, y), top)


@pytest.mark.usefixtures("as_on_gpu")
def test_a_batch_with_other_keys_is_taken_as_usual() -> None:
    assert_one_batch_is_taken_as_usual(SignByKey, lambda batch, other: {"minus" if other else "plus": batch})


def assert_one_batch_is_taken_as_usual(cls: type[Fit], changed: Callable[[Any, bool], Any]) -> None:
    """The last of seven batches differs from the others."""

    def make() -> list[mlo.Problem]:
        problems = levels(cls)
        batches = [changed(problems[0].stream.peek(i), i == 6) for i in range(7)]
        problems[0].stream = open_stream(batches, "low")
        return problems

    plain, captured = engines(make, "one_step")
    run_both(plain, captured, 12)
    assert_same(plain, captured)
    assert captured.report().replayed == 7


@pytest.mark.usefixtures("as_on_gpu")
def test_losses_and_reports_of_a_replay_are_not_overwritten_by_the_next_one() -> None:
    _, captured = engines(levels, WARM_CG)
    captured.run(6)
    seen = [*captured.losses.values(), *captured._gradients.reports.values()]
    before = [value.clone() for value in seen]
    captured.run(2)
    assert captured.report().replayed >= 3
    assert all(map(torch.equal, seen, before))


class Counted(Fit):
    def loss(self, batch: Any, top: mlo.Problem) -> Tensor:
        x, y, factor = batch
        return super().loss((x.double() * factor, y), top)


@pytest.mark.usefixtures("as_on_gpu")
def test_equal_numbers_are_replayed_and_another_dtype_is_not() -> None:
    assert_one_batch_is_taken_as_usual(
        Counted, lambda batch, other: (batch[0].float() if other else batch[0], batch[1], float("2.5"))
    )


@pytest.mark.usefixtures("as_on_gpu")
def test_replays_after_a_bad_loss_change_nothing_until_it_is_reported() -> None:
    _, captured = engines(levels, "one_step")
    captured.run(6)
    captured.problems["low"].stream.peek()[0].fill_(float("nan"))
    captured._updater.check_arrived = lambda: None  # type: ignore[method-assign]
    captured.step()
    low = captured.problems["low"].module
    before = copy.deepcopy(low.state_dict())
    captured.step()
    captured.step()
    assert captured.report().replayed == 5
    torch.testing.assert_close(low.state_dict(), before, rtol=0, atol=0)
