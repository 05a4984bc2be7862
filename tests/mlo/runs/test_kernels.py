"""How torch chooses kernels inside a run, and that everything is as before after it."""

import os

import pytest
import torch

from mlo.runs.job import Job
from mlo.runs.run import Run

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
DEFAULTS = {"benchmark": False, "deterministic": False, "everywhere": False, "warn": False, "workspace": None}
SAME_BITS = DEFAULTS | {"deterministic": True, "everywhere": True, "workspace": ":4096:8"}


def flags():
    return {
        "benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.backends.cudnn.deterministic,
        "everywhere": torch.are_deterministic_algorithms_enabled(),
        "warn": torch.is_deterministic_algorithms_warn_only_enabled(),
        "workspace": os.environ.get(WORKSPACE),
    }


def flags_inside(ridge, monkeypatch, tmp_path, deterministic, fails=False):
    found = []

    def run(job, run):
        found.append(flags())
        if fails:
            raise KeyboardInterrupt

    monkeypatch.setattr(ridge.RidgeJob, "run", run)
    created = Run.create("ridge", ridge.RidgeJob(device="cpu", deterministic=deterministic), tmp_path / "run")
    if fails:
        with pytest.raises(KeyboardInterrupt):
            created.execute()
    else:
        created.execute()
    return found[0]


@pytest.fixture(autouse=True)
def no_workspace(monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    assert flags() == DEFAULTS


@pytest.mark.parametrize("fails", [False, True])
def test_a_deterministic_run(ridge, monkeypatch, tmp_path, fails):
    assert flags_inside(ridge, monkeypatch, tmp_path, True, fails) == SAME_BITS
    assert flags() == DEFAULTS


def test_a_run_on_a_gpu_chooses_the_fastest_kernels_and_one_on_the_cpu_changes_nothing(ridge, monkeypatch, tmp_path):
    assert flags_inside(ridge, monkeypatch, tmp_path / "cpu", False) == DEFAULTS
    monkeypatch.setattr(Job, "torch_device", torch.device("cuda", 0))
    assert flags_inside(ridge, monkeypatch, tmp_path / "gpu", False) == DEFAULTS | {"benchmark": True}
    assert flags() == DEFAULTS


def test_a_workspace_that_the_user_chose_is_kept(ridge, monkeypatch, tmp_path):
    monkeypatch.setenv(WORKSPACE, ":16:8")
    assert flags_inside(ridge, monkeypatch, tmp_path, True) == SAME_BITS | {"workspace": ":16:8"}
    assert os.environ[WORKSPACE] == ":16:8"
