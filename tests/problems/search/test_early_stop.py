"""The early stop: when eigenvalues are computed, that nothing else changes, and where a stopped search goes back to."""

from __future__ import annotations

import pytest
import torch
from engine_state import same
from interruption import PowerCutError, before_each_step

from mlo.options.config import parse
from mlo.runs.run import Run
from problems.jobs.lbt import LbtJob
from problems.jobs.report import eigenvalue_curve
from problems.nas import architecture_loss, dominant_eigenvalue
from problems.search import early_stop
from problems.search.early_stop import early_stop_epoch, final_logits, sharpness, should_stop

FEW = ["avg_pool_3x3", "skip_connect", "max_pool_3x3"]  # cheap ones, to be fast
RISING = [1.0] * 13 + [3.0] * 8  # the mean of 5 around 12 is 1.4, of 4 earlier 1.0


def job(**options: object) -> LbtJob:
    search = {"channels": 1, "cells": 3, "batch_size": 10, "operations": FEW, **options.pop("search", {})}
    data = {"train_size": 40, "validation_size": 50, "unlabeled_size": 60}
    return parse(LbtJob, {"data": data, "device": "cpu", "log_every": 1, "search": search, **options})


def engine(every: int | None, method: str = "lbt"):
    torch.manual_seed(0)
    return job(search={"eigenvalue_every": every}).search_engine(method)


@pytest.fixture
def rising(monkeypatch):
    """Prescribed eigenvalues in place of those computed."""
    taken = []

    def prescribed(loss, logits):
        taken.append({kind: matrix.tolist() for kind, matrix in logits._asdict().items()})
        return RISING[len(taken) - 1]

    monkeypatch.setattr(early_stop, "dominant_eigenvalue", prescribed)
    return taken


def test_computing_eigenvalues_changes_nothing():
    watched, left_alone = engine(2), engine(None)
    for _ in range(4):
        for searching in (watched, left_alone):
            searching.step()
            assert not should_stop(searching)
    assert sharpness(watched).rounds == [2, 4]
    one, other = watched.state_dict(), left_alone.state_dict()
    del one["problems"]["arch"]["module"]["sharpness._extra_state"]
    assert same(one, other)


def test_the_eigenvalue_is_that_of_the_next_validation_batch():
    searching = engine(1)
    searching.step()
    should_stop(searching)
    images, labels = searching.problems["arch"].stream.next()
    loss = architecture_loss(searching.problems["teacher"].module, images, labels)
    expected = dominant_eigenvalue(loss, searching.problems["arch"].module())
    assert expected > 0
    assert sharpness(searching).eigenvalues == [expected]
    assert searching.metrics()["arch/eigenvalue"] == pytest.approx(expected)
    assert "arch/eigenvalue" not in engine(None).metrics()


def test_a_round_has_one_eigenvalue(rising):
    searching = engine(2)
    for _ in range(2):
        searching.step()
        should_stop(searching)
        should_stop(searching)
    assert sharpness(searching).rounds == [2]
    searching.step()
    should_stop(searching)
    assert "arch/eigenvalue" not in searching.metrics(), "only in the rounds that it is taken in"


def search(run: Run, before=lambda rounds: None, rounds: int = 30) -> dict:
    assert run.job.splits, "made once, before the stages, as in a run"

    def build():
        return before_each_step(run.job.search_engine("plain"), before)

    return run.stage("search", build, rounds, final_logits, should_stop)


def test_a_search_that_grew_sharp_ends_and_goes_back(rising, tmp_path):
    folder = Run.create("lbt", job(search={"eigenvalue_every": 1}), tmp_path / "run")
    found = search(folder)
    entries = next(n for n in range(len(RISING)) if early_stop_epoch(RISING[:n]) is not None)
    earlier = early_stop_epoch(RISING[:entries])
    assert (entries, earlier) == (17, 10)
    assert found == {**rising[earlier], "search_rounds": entries, "architecture_of_round": earlier + 1}
    assert rising[earlier] != rising[-1]
    assert [line["arch/eigenvalue"] for line in folder.metrics("search")] == RISING[:entries]


@pytest.mark.parametrize("dies", [4, 15])
def test_a_watched_search_that_died_ends_as_an_unbroken_one(rising, tmp_path, dies):
    watched = job(search={"eigenvalue_every": 1}, checkpoint_every=3)
    unbroken = search(Run.create("lbt", watched, tmp_path / "unbroken"))
    del rising[:]

    def power_cut(rounds):
        if rounds == dies:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        search(Run.create("lbt", watched, tmp_path / "run"), power_cut)
    del rising[dies // 3 * 3 :]
    assert search(Run.open(tmp_path / "run")) == unbroken
    texts = [(tmp_path / name / "stages/search/metrics.jsonl").read_text() for name in ("run", "unbroken")]
    assert texts[0] == texts[1]


def test_a_search_that_did_not_grow_sharp_ends_with_its_last(rising, tmp_path):
    folder = Run.create("lbt", job(search={"eigenvalue_every": 15}), tmp_path / "run")
    found = search(folder)
    assert (found["search_rounds"], found["architecture_of_round"]) == (30, 30)
    assert found["normal"] == rising[-1]["normal"]
    assert set(search(Run.create("lbt", job(), tmp_path / "other"), rounds=3)) == {"normal", "reduce"}


def test_the_curve_shows_the_rounds_that_have_an_eigenvalue():
    lines = [{"step": 1, "arch/loss": 1.0}, {"step": 2, "arch/eigenvalue": 0.5}, {"step": 4, "arch/eigenvalue": 0.25}]
    (line,) = eigenvalue_curve(lines).axes[0].get_lines()
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([2, 4], [0.5, 0.25])


def test_an_interval_that_is_not_logged_is_an_error():
    with pytest.raises(ValueError, match=r"3 is not a multiple of log_every \(2\)"):
        job(search={"eigenvalue_every": 3}, log_every=2)
