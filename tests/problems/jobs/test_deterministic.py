"""A deterministic search that died and was resumed has the same bits as another one, on a GPU too."""

from __future__ import annotations

import pytest
import torch
from engine_state import same
from interruption import PowerCutError, before_each_step

from mlo.options.config import parse
from mlo.runs.run import Run
from mlo.training import checkpoint
from problems.jobs import lbt_stages
from problems.jobs.lbt import LbtJob

OPTIONS = {
    "methods": ["lbt"],
    "steps": 6,
    "checkpoint_every": 2,
    "page": False,
    "deterministic": True,
    "data": {"train_size": 40, "validation_size": 40, "unlabeled_size": 40, "test_size": 40},
    "search": {"channels": 2, "cells": 3, "batch_size": 10, "augmentation": {"crop": 1, "flip": True}},
    "evaluation": {"channels": 2, "cells": 1, "batch_size": 10, "steps": 2},
}


def test_resumed_searches_have_the_same_bits(device, tmp_path, monkeypatch) -> None:
    build = lbt_stages.search_engine

    def power_cut(rounds: int) -> None:
        if rounds == 3:
            raise PowerCutError

    job = parse(LbtJob, {**OPTIONS, "device": str(device)})
    states = []
    for name in ("one", "other"):
        monkeypatch.setattr(lbt_stages, "search_engine", lambda *args: before_each_step(build(*args), power_cut))
        with pytest.raises(PowerCutError):
            Run.create("lbt", job, tmp_path / name).execute()
        monkeypatch.setattr(lbt_stages, "search_engine", build)
        Run.open(tmp_path / name).execute()
        states.append(checkpoint.load(tmp_path / name / "stages/search-lbt/step-000000006.pt"))
    assert same(*states)
    assert not torch.are_deterministic_algorithms_enabled()
