"""The option `capture`: replayed rounds of a search and of a final training are the same, and where it is refused."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from replaying import Drawing, assert_same

import mlo
from mlo.errors import ConfigError
from mlo.options.config import parse, validate
from problems.data import images
from problems.jobs.evaluate import EvaluateJob
from problems.jobs.lbt import LbtJob
from problems.nas import PUBLISHED
from problems.search import early_stop

OPERATIONS = ["none", "max_pool_3x3", "skip_connect", "dil_conv_5x5"]
OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "log_every": 1,
    "data": {"train_size": 40, "validation_size": 40, "unlabeled_size": 40},
    "search": {"channels": 1, "cells": 3, "batch_size": 10, "operations": OPERATIONS},
    "evaluation": {"channels": 2, "cells": 1, "batch_size": 10},
}


def job(capture: bool, search: dict | None = None, **options: object) -> LbtJob:
    return parse(LbtJob, {**OPTIONS, "search": {**OPTIONS["search"], **(search or {})}, "capture": capture, **options})


@pytest.fixture
def capturable_on_cpu(as_on_gpu: None, float64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds in float64 are recorded on the CPU, and Adam counts its steps there in tensors."""
    normalized = images._Batched._normalized
    monkeypatch.setattr(images._Batched, "_normalized", lambda self, batch: normalized(self, batch).double())
    adam = import_module("torch.optim.adam")  # torch.optim hides it
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda *_: ["cpu"])


def searched(method: str, rounds: int = 7, **options: object) -> tuple[mlo.Engine, mlo.Engine]:
    """The engine of a search without capture and the one with it, after some rounds."""
    found, begin = [], Drawing.default.get_state()
    for capture in (False, True):
        torch.manual_seed(0)
        engine = job(capture, **options).search_engine(method)
        Drawing.default.set_state(begin)
        with Drawing():
            engine.run(rounds, [early_stop.should_stop])
        engine.problems["arch"].optimizer.param_groups[0]["capturable"] = True  # it is compared too
        found.append(engine)
    return found[0], found[1]


SLOW = [
    ("lbt", {}),
    ("lbt", {"judged_by": "student", "student_learns_from": "pseudo_labels", "pseudo_label_path": "paper"}),
    ("lbt", {"search": {"space": "pc_darts", "channels": 4}}),
    ("lbt", {"variant": "authors", "student_learns_from": "pseudo_labels"}),
    ("lbt", {"search": {"operations": [*OPERATIONS, "noise"]}}),
    ("plain", {"variant": "authors"}),
    ("plain", {"search": {"eigenvalue_every": 2}}),
]


@pytest.mark.usefixtures("capturable_on_cpu")
@pytest.mark.parametrize(
    ("method", "options"),
    [
        *[pytest.param(*each, marks=pytest.mark.slow) for each in SLOW],
        ("lbt", {"search": {"warmup": 1, "architecture_clip": 1.0, "augmentation": {"crop": 1, "flip": True}}}),
        ("lbt", {"teacher_hypergradient": "first_order", "lookahead": False}),
        ("lbt", {"variant": "authors", "search": {"warmup": 1}}),
        ("plain", {"search": {"operations": [*OPERATIONS, "noise"]}}),
    ],
    ids=str,
)
def test_a_captured_search_is_the_same(method: str, options: dict[str, Any]) -> None:
    plain, captured = searched(method, **options)
    assert captured.report().replayed >= 2
    assert_same(plain, captured, rtol=1e-7)


NOT_CAPTURED: list[tuple[dict[str, Any], str]] = [
    ({"search": {"skip_dropout": 0.1}}, "the loss of 'teacher' asks for steps_taken"),
]


@pytest.mark.usefixtures("capturable_on_cpu")
@pytest.mark.parametrize(("options", "why"), NOT_CAPTURED, ids=str)
def test_what_cannot_be_captured_is_said_once_and_runs_as_usual(options: dict[str, Any], why: str) -> None:
    with pytest.warns(UserWarning, match=f"rounds are not captured: {why}") as warned:
        plain, captured = searched("lbt", 4, **options)
    assert len(warned) == 1
    assert captured.report().replayed == 0
    assert_same(plain, captured, rtol=1e-7)


@pytest.mark.usefixtures("capturable_on_cpu")
def test_a_final_training_without_drop_path_is_captured() -> None:
    found = []
    for capture in (False, True):
        torch.manual_seed(0)
        found.append(job(capture).training_engine(PUBLISHED["DARTS_V2"]))
        found[-1].run(7)
    assert found[1].report().replayed == 3
    assert_same(*found)


@pytest.mark.usefixtures("capturable_on_cpu")
def test_a_final_training_with_drop_path_runs_as_usual() -> None:
    evaluation = {**OPTIONS["evaluation"], "drop_path": 0.2}
    engine = job(True, evaluation=evaluation).training_engine(PUBLISHED["DARTS_V2"])
    engine.run(4)
    assert "capture=False" in str(engine.report())


@pytest.mark.parametrize("model", [LbtJob, EvaluateJob])
def test_capture_needs_a_gpu_and_says_so_before_anything_is_loaded(model: type[Any]) -> None:
    options = {"data": {"source": "/no/such/folder"}, "device": "cpu", "capture": True}
    chosen = validate(model, {**options, **({"genotype": "DARTS_V2"} if model is EvaluateJob else {})}, "test")
    with pytest.raises(ConfigError, match=r"capture: needs a CUDA GPU, and the device is cpu; write capture: false"):
        chosen.check()


def test_drop_path_excludes_capture() -> None:
    options = {"genotype": "DARTS_V2", "training": {"drop_path": 0.1}, "capture": True}
    with pytest.raises(
        ConfigError, match=r"capture: cannot be used with training.drop_path, which grows with the steps"
    ):
        validate(EvaluateJob, options, "test")
