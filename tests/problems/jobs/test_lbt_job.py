"""The main job as a user runs it: whole, on real digits, stopped by force and resumed, and with wrong options."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from command_process import CommandProcess

from mlo.training import checkpoint
from problems.jobs.lbt import LbtJob
from problems.nas import Genotype

SMALL = {
    "steps": 4,
    "log-every": 1,
    "checkpoint-every": 2,
    "search.channels": 1,
    "search.cells": 3,
    "search.batch-size": 16,
    "evaluation.steps": 4,
    "evaluation.channels": 2,
    "evaluation.cells": 1,
    "data.train-size": 40,
    "data.validation-size": 40,
    "data.unlabeled-size": 40,
}
FEW = "--search.operations=[skip_connect, avg_pool_3x3, sep_conv_3x3]"  # which take less time than all
NO_PAGE = "--page=false"


def small(*words: object) -> list[str]:
    """The words of a small run's options, but for those that ``words`` give."""
    own = [str(word) for word in words]
    given = {word.partition("=")[0] for word in own}
    return [*(f"--{name}={value}" for name, value in SMALL.items() if f"--{name}" not in given), *own]


def final_states(run: Path) -> dict[str, dict]:
    return {stage.name: checkpoint.load(max(stage.glob("step-*.pt"))) for stage in sorted((run / "stages").iterdir())}


def assert_identical(one: object, other: object) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_identical(one[key], other[key])
    elif isinstance(one, list | tuple):
        for mine, others in zip(one, other, strict=True):
            assert_identical(mine, others)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    process = CommandProcess("run", "lbt", *small(), "--output=unbroken", folder=folder, logs=folder / "logs")
    _, err = process.output()
    assert process.code == 0, err
    return folder / "unbroken"


def test_a_run_leaves_everything_that_shows_it(unbroken):
    for name in ("genotype.json", "genotype-plain.json"):
        Genotype.load(unbroken / name)
    for method in ("lbt", "plain"):
        result = json.loads((unbroken / "stages" / f"train-{method}" / "result.json").read_text())
        assert 0 <= result["test_error"] <= 100
        assert result["parameters"] > 100
        lines = (unbroken / "stages" / f"search-{method}" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
        for title in (
            "normal-cell",
            "reduction-cell",
            "losses-of-the-search",
            "mean-weight-of-each-operation",
            "skip-connections-and-entropy",
        ):
            assert (unbroken / "figures" / f"{method}-{title}.png").read_bytes().startswith(b"\x89PNG")
    losses = json.loads(lines[-1])
    assert losses["teacher/loss"] > 0
    assert sum(v for k, v in losses.items() if k.startswith("arch/normal/") and "entropy" not in k) == pytest.approx(1)
    page = (unbroken / "report.html").read_text()
    assert page.count("<svg") == 12
    assert re.findall(r'(?:src|href)="((?!#|genotype)[^"]*)', page) == [], "the page is self-contained"
    assert "pseudo_weight: 1.0" in page


@pytest.mark.processes
def test_a_run_killed_in_either_search_resumes_to_the_same_bits(unbroken, command_line, tmp_path):
    run = tmp_path / "killed"
    for stage, words in (("search-lbt", ["run", "lbt", *small(), "--output"]), ("search-plain", ["resume"])):
        process = CommandProcess(*words, run, folder=tmp_path, logs=tmp_path / stage)
        process.wait_until(lambda stage=stage: list(run.glob(f"stages/{stage}/step-*2.pt")))
        process.send(signal.SIGKILL)
        assert process.code == -signal.SIGKILL
        assert not (run / "report.html").exists()
        assert not (run / "stages" / stage / "result.json").exists()
    code, _, err = command_line("resume", run)
    assert code == 0, err
    assert_identical(final_states(run), final_states(unbroken))
    for path in ("genotype.json", *(f"stages/{s}/metrics.jsonl" for s in final_states(run))):
        assert (run / path).read_text() == (unbroken / path).read_text()


def test_another_seed_is_another_run(unbroken, command_line, tmp_path):
    words = small("--evaluation.steps=1", NO_PAGE, "--seed", 1, "--methods", "[lbt]")
    code, _, err = command_line("run", "lbt", *words, "--output", tmp_path / "other")
    assert code == 0, err
    one, other = (final_states(r)["search-lbt"]["problems"]["arch"]["module"] for r in (unbroken, tmp_path / "other"))
    assert not torch.equal(one["normal"], other["normal"])


@pytest.mark.parametrize(
    "options",
    [
        ["--hypergradient", "neumann", "--judged-by", "student", FEW, NO_PAGE],
        ["--hypergradient", '{"kind": "cg", "damping": 1.0}', "--student-learns-from", "pseudo_labels", FEW, NO_PAGE],
        ["--hypergradient", "first_order", "--lookahead", "true", FEW, NO_PAGE],
        [
            "--hypergradient",
            "one_step",
            "--pseudo-label-path",
            "paper",
            "--methods",
            "[random, best_of_random, lbt]",
            "--draws",
            "2",
            FEW,
        ],
        ["--search.space", "p_darts", "--search.cells", "[3, 3, 3]", "--search.skip-dropout", "0.3"],
        ["--search.space", "pc_darts", "--search.channels", "4", "--search.warmup", "1", NO_PAGE],
        ["--teacher-hypergradient", "first_order", "--search.operations", "[noise, skip_connect, sep_conv_3x3]"],
        ["--student", "small_wide", "--search.augmentation.crop", "1", FEW, NO_PAGE],
    ],
    ids=lambda words: words[1],
)
def test_options_reach_the_search(command_line, tmp_path, options):
    methods = [] if "--methods" in options else ["--methods=[lbt]"]
    words = small("--steps=2", "--evaluation.steps=2", *methods, *options)
    code, _, err = command_line("run", "lbt", *words, "--output", tmp_path / "r")
    assert code == 0, err
    Genotype.load(tmp_path / "r" / "genotype.json")
    assert (tmp_path / "r" / "report.html").exists() == (NO_PAGE not in options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.source", "digit"], "data.source: 'digit' does not exist; did you mean digits"),
        (["--data.unlabeled-size", 1700], "but digits has 1797 images"),
        (["--data.train-size", 5], "train_size=5 is less than one image for each of the 10 classes"),
        (["--hypergradent", "cg"], "hypergradent: unknown option; did you mean hypergradient?"),
        (["--steps", "many"], 'steps: "many" was given, but it should be'),
        (
            ["--student", "resnet19", "--methods", "[plain, lbt]"],
            "'resnet19' is not known as a student; did you mean resnet18?",
        ),
        (["--search.space", "pdarts"], "it should be 'darts', 'pc_darts' or 'p_darts'; did you mean p_darts?"),
        (["--search.cells", "[1, 2]"], "cells has 2 entries, but the search has 1 stage;"),
        (["--evaluation.auxiliary"], "the head needs images of at least 32x32 pixels, but these are 8 high"),
        (["--methods", "[lbt, dart]"], "dart"),
    ],
    ids=str,
)
def test_wrong_options_are_reported_and_leave_nothing(command_line, tmp_path, options, message):
    code, out, err = command_line("run", "lbt", *options, "--output", tmp_path / "r")
    assert code in (1, 2)
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "r").exists()


def test_a_sweep_reports_what_is_not_there_before_anything_runs(command_line, tmp_path):
    grid = ["--grid.student", "[smal, small]", "--grid.data.source", "[digits, digit]", "--seeds", 2]
    code, out, err = command_line("sweep", "lbt", *grid, "--output", tmp_path / "s")
    assert (code, out) == (2, "")
    assert "s/student=smal,data.source=digits,seed=0: 'smal' is not known as a student; did you mean small?" in err
    assert "s/student=smal,data.source=digit,seed=0 (and 1 more): data.source: 'digit' does not exist" in err
    assert not (tmp_path / "s").exists()


def test_images_of_ones_own_from_an_npz_file(command_line, tmp_path):
    draw = np.random.default_rng(0)
    arrays = {
        f"{part}_{what}": draw.integers(0, 256, (120, 8, 8, 3), dtype=np.uint8)
        if what == "images"
        else np.arange(120) % 10
        for part in ("train", "test")
        for what in ("images", "labels")
    }
    np.savez(tmp_path / "mine.npz", **arrays)
    own = ["--data.source", tmp_path / "mine.npz", "--methods", "[lbt]", FEW, NO_PAGE]
    code, _, err = command_line("run", "lbt", *small("--steps=2", *own), "--output", tmp_path / "r")
    assert code == 0, err
    del arrays["test_labels"]
    np.savez(tmp_path / "cut.npz", **arrays)
    _, _, err = command_line("run", "lbt", *small(), "--data.source", tmp_path / "cut.npz", "--output", tmp_path / "s")
    assert "cut.npz has no test_labels" in err


def test_the_graphs_are_those_of_the_methods_that_would_run(command_line):
    lbt = [
        "search-lbt:",
        "level 3  arch  reads teacher (best response), student (best response)",
        "level 2  student  reads teacher (best response), arch (input)",
        "level 1  teacher  reads arch (input)",
        "",
    ]
    plain = [
        "search-plain:",
        "level 2  arch  reads teacher (best response)",
        "level 1  teacher  reads arch (input)",
        "",
    ]
    assert command_line("graph", "lbt", "--methods", "[plain]")[1].splitlines()[:4] == plain
    both = command_line("graph", "lbt")[1].splitlines()
    assert both == [*lbt, "train-lbt, train-plain:", "level 1  network  reads nothing", "", *plain[:-1]]


def test_an_engine_does_not_depend_on_whether_the_images_were_loaded_before(tmp_path):
    """A run that goes on loads them when its next stage begins; a new run loads them when it is checked."""
    weights = []
    for early in (True, False):
        job = LbtJob(data={"train_size": 40, "validation_size": 40, "unlabeled_size": 40}, search={"channels": 2})
        if early:
            job.check()
        torch.manual_seed(0)
        engine = job.engine()
        weights.append([p for problem in engine.problems.values() for p in problem.module.parameters()])
        weights[-1].append(torch.rand(1))
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
