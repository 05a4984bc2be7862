"""The presets of `mlo run lbt`: their options are the paper's, and how they are used on the command line."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from mlo.hypergradient.estimators.one_step import Darts
from mlo.options.config import defaults, options, validate
from mlo.options.yaml_options import flat, merge, read_yaml
from problems.jobs.lbt import LbtJob
from problems.paper.settings import Setting

H100 = read_yaml(LbtJob.presets["h100"])
FOR_SPEED = {"capture": True}


def job_of(given: dict) -> LbtJob:
    return validate(LbtJob, merge(defaults(LbtJob), given), "test")


def test_h100_is_the_papers_search_and_evaluation_and_options_for_speed():
    paper = Setting("cifar10", "darts2", "rn18").options("paper")
    assert job_of(H100) == job_of({**paper, **FOR_SPEED})


def test_h100_has_the_numbers_of_the_paper():
    job = job_of(H100)
    search, final = job.search, job.evaluation
    assert (search.space, search.cells, search.channels, search.batch_size) == ("darts", 8, 16, 64)
    assert (job.data.source, job.data.train_size, job.data.validation_size) == ("cifar10", 25_000, 25_000)
    assert job.steps == 50 * (25_000 // 64) == 19_500
    assert (search.learning_rate, search.precision, job.student) == (0.025, "float32", "resnet18")
    assert isinstance(job.teacher_estimator, Darts)
    assert job.lookahead is None  # so it is that of darts: true
    assert (final.cells, final.channels, final.batch_size, final.images) == (20, 36, 96, "everything")
    assert final.steps == 600 * (50_000 // 96)


def test_the_options_of_a_preset_can_be_read_without_torch():
    known = {option.path for option in options(LbtJob, kinds=False)}
    assert set(flat(H100)) <= known
    code = (
        "import sys; from mlo.options.yaml_options import read_yaml; from problems.jobs.lbt import LbtJob; "
        "[read_yaml(path) for path in LbtJob.presets.values()]; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_preset_on_the_cpu_is_refused_with_the_reason(command_line, tmp_path):
    code, _, err = command_line("run", "lbt", "--preset", "h100", "--device", "cpu", "--output", tmp_path / "run")
    assert code == 2
    assert (
        err == "error: capture: needs a CUDA GPU, and the device is cpu; write capture: false, or give another device\n"
    )
    assert not (tmp_path / "run").exists()


def test_any_option_can_be_changed_and_all_are_recorded(command_line, tmp_path, monkeypatch):
    monkeypatch.setattr(LbtJob, "check", lambda job: None)
    monkeypatch.setattr(LbtJob, "run", lambda job, run: None)
    (tmp_path / "mine.yaml").write_text("search: {channels: 4, cells: 3}\n")
    words = ("--preset", "h100", "--capture", "false", "--search.cells", "5", "--config", tmp_path / "mine.yaml")
    code, _, err = command_line("run", "lbt", *words, "--output", tmp_path / "run")
    assert code == 0, err
    recorded = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (recorded["capture"], recorded["search"]["cells"], recorded["search"]["channels"]) == (False, 5, 4)
    assert (recorded["steps"], recorded["search"]["batch_size"]) == (19_500, 64)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lbt", "--preset", "h10"], "'h10' is not known among the presets of this job; did you mean h100?"),
        (["evaluate", "--preset", "h100"], "this job has no presets; leave it out"),
    ],
)
def test_an_unknown_preset_is_an_error(command_line, words, message):
    code, _, err = command_line("run", *words)
    assert code == 2
    assert message in err
