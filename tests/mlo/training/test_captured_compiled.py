"""Captured rounds of compiled passes. Here they are compiled to operations that can be recorded, not to kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from recorded_levels import Fit, engines, levels
from replaying import Drawing, assert_same, record
from torch import Tensor, nn

import mlo
from mlo.ops import compiler as compiler_module
from mlo.steps import compiled as compiled_module
from mlo.training import engine as engine_module
from mlo.training.captured import Captured


@pytest.fixture(autouse=True)
def to_operations(as_on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {key: value for key, value in compiler_module._OPTIONS.items() if key != "options"}
    monkeypatch.setattr(compiler_module, "_OPTIONS", {**options, "backend": "aot_eager"})


def linear_levels(**low: Any) -> list[mlo.Problem]:
    problems = levels(**low)
    model = nn.Linear(3, 2).double()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.9)
    data = [problems[0].stream.peek(i) for i in range(7)]
    return [Fit("low", module=model, optimizer=sgd, scheduler=scheduler, data=data, **low), problems[1]]


SLOW: list[tuple[Any, ...]] = [
    (linear_levels, "one_step", {}),
    (linear_levels, "darts", {}),
    (levels, {"kind": "cg", "iterations": 2, "tolerance": 0.0}, {}),
    (levels, "darts", {"steps": 2, "accumulate": 2}),
    (levels, "unrolled", {"steps": 2}),
]


@pytest.mark.parametrize(
    ("make", "kind", "low"),
    [(linear_levels, "first_order", {}), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
    ids=str,
)
def test_a_replayed_round_of_compiled_passes_is_the_same(
    make: Callable[..., list[mlo.Problem]], kind: Any, low: dict[str, Any]
) -> None:
    plain, captured = engines(partial(make, **low), kind, compile=True)
    for engine in (plain, captured):
        engine.run(9)
    assert_same(plain, captured)
    report = captured.report()
    assert report.replayed >= 4
    assert all(problem.compiled and not problem.not_compiled for problem in report.problems.values())


@pytest.mark.slow
def test_compiled_steps_in_one_graph_read_the_learning_rates_of_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    scalar = compiled_module._scalar  # of numbers in float64 on the CPU, torch's guards read the values
    monkeypatch.setattr(compiled_module, "_scalar", lambda value, device: scalar(value, device).float())
    plain, captured = engines(partial(linear_levels, steps=5), "unrolled", lookahead=True, compile=True)
    for engine in (plain, captured):
        engine.run(9)
    assert_same(plain, captured)
    assert captured.report().replayed >= 4
    assert "5 steps as one" in captured.report().problems["low"].compiled


class Noisy(Fit):
    def loss(self, batch: Any, top: mlo.Problem) -> Tensor:
        x, y = batch
        return super().loss((x + 0.1 * torch.randn_like(x), y), top)


@pytest.mark.slow
def test_compiled_passes_draw_the_numbers_of_usual_ones() -> None:
    plain, captured = engines(partial(levels, Noisy), "darts", compile=True)
    for engine in (plain, captured):
        Drawing.default.set_state(torch.tensor([3, 0]))
        with Drawing():
            engine.run(9)
    assert_same(plain, captured)
    assert captured.report().replayed >= 4


@pytest.mark.slow
def test_nothing_is_compiled_while_a_round_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def again(function: Callable[[], None]) -> Callable[[], None]:
        torch._dynamo.reset()
        return record(function)

    monkeypatch.setattr(engine_module, "Captured", partial(Captured, record=again))
    plain, captured = engines(linear_levels, "first_order", compile=True)
    plain.run(7)
    with pytest.warns(UserWarning, match="not captured, only compiled passes: a round cannot be recorded: .*recompile"):
        captured.run(7)
    assert_same(plain, captured)
    assert captured.report().replayed == 0
    assert captured.report().problems["low"].compiled


@pytest.mark.parametrize("capture", [False, True])
def test_only_without_capture_are_compiled_passes_graphs_of_their_own(
    capture: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(compiler_module, "_OPTIONS", {"options": {"triton.cudagraphs": False}})
    monkeypatch.setattr(torch, "compile", lambda function, **options: given.append(options["options"]) or function)
    compiler = compiler_module.Compiler(torch.device("cuda"), rounds_captured=capture)
    for leaves_graph in (False, True):
        compiler.add(("low", str(leaves_graph)), lambda: None, leaves_graph)
    assert [options["triton.cudagraphs"] for options in given] == [not capture, False]
    assert compiler.scalars_on.type == ("cuda" if capture else "cpu")
    compiler.capture_functions()  # no round could be captured
    assert ("low", "False") not in compiler
    compiler.add(("low", "False"), lambda: None, leaves_graph=False)
    assert given[-1]["triton.cudagraphs"]
    assert compiler.scalars_on.type == "cpu"
