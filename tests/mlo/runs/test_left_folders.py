"""Run folders in which nothing was done yet: they are taken again, and what a user has there is not."""

import itertools
from pathlib import Path

import pytest

from mlo.errors import ConfigError
from mlo.files import write_atomic
from mlo.runs.run import Run, read_results
from mlo.sweeps.grid import Planned, check, execute


def killed_after(files):
    """Write so many files, and be killed in the midst of the next."""
    count = itertools.count()

    def write(path, content):
        if next(count) == files:
            path.with_name(f".{path.name}.123.tmp").write_text("half")
            raise KeyboardInterrupt
        write_atomic(path, content)

    return write


@pytest.mark.parametrize("files", [0, 1])
def test_a_run_that_was_killed_while_its_folder_was_made_begins_again(ridge, tmp_path, monkeypatch, files):
    plan = Planned(tmp_path / "run", "ridge", {"steps": 1, "device": "cpu"})
    with monkeypatch.context() as patched:
        patched.setattr("mlo.runs.run.write_atomic", killed_after(files))
        with pytest.raises(KeyboardInterrupt):
            Run.create("ridge", plan.made(), plan.folder)
    assert not plan.begun()
    check([plan])
    execute(plan)
    assert plan.begun()
    assert plan.finished()


def test_options_alone_are_taken_again_only_if_they_are_the_same(ridge, tmp_path):
    plan = Planned(tmp_path / "run", "ridge", {"steps": 1})
    Run.create("ridge", plan.made(), plan.folder)
    (plan.folder / "run.json").unlink()
    check([plan])
    Run.create("ridge", plan.made(), plan.folder)
    (plan.folder / "run.json").unlink()
    other = Planned(plan.folder, "ridge", {"steps": 2})
    with pytest.raises(ConfigError, match="is no run folder"):
        check([other])
    with pytest.raises(ConfigError, match="nothing is written over"):
        Run.create("ridge", other.made(), plan.folder)


def test_a_folder_without_a_stage_is_taken_for_other_options(ridge, tmp_path):
    first = Run.create("ridge", ridge.RidgeJob(), tmp_path / "run")
    (first.path / "log.txt").write_text("error: no such data\n")
    plan = Planned(first.path, "ridge", {"steps": 1, "device": "cpu"})
    assert not plan.begun()
    check([plan])
    execute(plan)
    assert "steps: 1\n" in (first.path / "config.yaml").read_text()
    assert (first.path / "log.txt").read_text().startswith("error: no such data\n")


@pytest.mark.parametrize("name", ["stages", "mine.txt", ".run.json.tmp"])
def test_a_folder_that_holds_more_is_not_taken(ridge, tmp_path, name):
    run = Run.create("ridge", ridge.RidgeJob(), tmp_path / "run")
    (run.path / name).mkdir()
    plan = Planned(run.path, "ridge", {"steps": 1})
    assert plan.begun()
    with pytest.raises(ConfigError, match="holds a run with other options"):
        check([plan])
    with pytest.raises(ConfigError, match="nothing is written over"):
        Run.create("ridge", plan.made(), run.path)
    run.discard()
    assert (run.path / "config.yaml").exists()


def test_the_folder_of_a_running_process_is_neither_taken_nor_discarded(ridge, tmp_path):
    run = Run.create("ridge", ridge.RidgeJob(), tmp_path / "run")
    with run.locked():
        with pytest.raises(ConfigError, match="another process is running in this folder"):
            Run.create("ridge", ridge.RidgeJob(steps=1), run.path)
        run.discard()
    assert "steps: 12\n" in (run.path / "config.yaml").read_text()
    assert read_results(run.path) is None


def test_whatever_ends_a_run_before_its_first_stage_leaves_no_folder(ridge, mlo, monkeypatch):
    def fail(job):
        raise ZeroDivisionError("in the job")

    monkeypatch.setattr(ridge.RidgeJob, "engine", fail)
    with pytest.raises(ZeroDivisionError, match="in the job"):
        mlo("run", "ridge", "--output", "out")
    assert not Path("out").exists()


def test_a_run_that_is_stopped_before_its_first_stage_can_go_on(ridge, mlo, monkeypatch):
    def stop(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(ridge.RidgeJob, "engine", stop)
    code, _, err = mlo("run", "ridge", "--output", "out")
    assert (code, Path("out/run.json").exists()) == (130, True)
    assert "mlo resume out" in err


@pytest.mark.parametrize("words", [("sweep", "ridge", "--output", "afile"), ("sweep", "ridge", "--output", "afile/in")])
def test_a_file_in_the_place_of_the_folder_of_runs_is_told(mlo, words):
    Path("afile").write_text("mine")
    code, _, err = mlo(*words)
    assert code == 2
    assert "error: afile: is a file, and no folder for runs; give another --output" in err
    assert Path("afile").read_text() == "mine"


def test_a_file_that_cannot_be_written_is_told_by_its_own_name(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        write_atomic(tmp_path / "no" / "such.txt", "text")
    assert raised.value.filename == str(tmp_path / "no" / "such.txt")
