"""Run folders in which no run has started: they can be used again, and files of the user in them are kept."""

import itertools
from pathlib import Path

import pytest

from mlo.errors import ConfigError
from mlo.files import write_atomic
from mlo.runs.folder import discard_folder, locked, read_results
from mlo.runs.run import Run
from mlo.sweeps.grid import Planned, check


def create(plan):
    return Run.create(plan.job, plan.load(), plan.folder)


def killed_after(files):
    """A function that writes so many files, and is killed while it writes the next one."""
    count = itertools.count()

    def write(path, content):
        if next(count) == files:
            path.with_name(f".{path.name}.123.tmp").write_text("half")
            raise KeyboardInterrupt
        write_atomic(path, content)

    return write


@pytest.mark.parametrize("files", [0, 1])
def test_a_run_that_was_killed_while_its_folder_was_created_can_be_created_again(ridge, tmp_path, monkeypatch, files):
    plan = Planned(tmp_path / "run", "ridge", {"steps": 1, "device": "cpu"})
    with monkeypatch.context() as patched:
        patched.setattr("mlo.runs.folder.write_atomic", killed_after(files))
        with pytest.raises(KeyboardInterrupt):
            create(plan)
    assert not plan.started()
    check([plan])
    create(plan).execute()
    assert plan.started()
    assert plan.finished()


def test_options_that_belong_to_no_run_are_kept(ridge, tmp_path):
    plan = Planned(tmp_path / "run", "ridge", {"steps": 1})
    create(plan)
    (plan.folder / "run.json").unlink()
    with pytest.raises(ConfigError, match="not a run folder"):
        check([plan])
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        create(plan)


def test_a_folder_without_a_stage_is_used_for_other_options(ridge, tmp_path):
    first = Run.create("ridge", ridge.RidgeJob(), tmp_path / "run")
    (first.path / "log.txt").write_text("error: no such data\n")
    plan = Planned(first.path, "ridge", {"steps": 1, "device": "cpu"})
    assert not plan.started()
    check([plan])
    create(plan).execute()
    assert "steps: 1\n" in (first.path / "config.yaml").read_text()
    assert (first.path / "log.txt").read_text().startswith("error: no such data\n")


@pytest.mark.parametrize("name", ["stages", "mine.txt", ".run.json.tmp"])
def test_a_folder_that_holds_more_is_not_used(ridge, tmp_path, name):
    run = Run.create("ridge", ridge.RidgeJob(), tmp_path / "run")
    (run.path / name).mkdir()
    plan = Planned(run.path, "ridge", {"steps": 1})
    assert plan.started()
    with pytest.raises(ConfigError, match="holds a run with other options"):
        check([plan])
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        create(plan)
    discard_folder(run.path)
    assert (run.path / "config.yaml").exists()


def test_the_folder_of_a_running_process_is_neither_used_nor_discarded(ridge, tmp_path):
    run = Run.create("ridge", ridge.RidgeJob(), tmp_path / "run")
    with locked(run.path):
        with pytest.raises(ConfigError, match="another process is running in this folder"):
            Run.create("ridge", ridge.RidgeJob(steps=1), run.path)
        discard_folder(run.path)
    assert "steps: 12\n" in (run.path / "config.yaml").read_text()
    assert read_results(run.path) is None


def test_an_error_before_the_first_stage_leaves_no_folder(ridge, mlo, monkeypatch):
    def fail(job):
        raise ZeroDivisionError("in the job")

    monkeypatch.setattr(ridge.RidgeJob, "engine", fail)
    with pytest.raises(ZeroDivisionError, match="in the job"):
        mlo("run", "ridge", "--output", "out")
    assert not Path("out").exists()


def test_a_run_that_is_stopped_before_its_first_stage_can_be_resumed(ridge, mlo, monkeypatch):
    def stop(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(ridge.RidgeJob, "engine", stop)
    code, _, err = mlo("run", "ridge", "--output", "out")
    assert (code, Path("out/run.json").exists()) == (130, True)
    assert "mlo resume out" in err


@pytest.mark.parametrize("words", [("sweep", "ridge", "--output", "afile"), ("sweep", "ridge", "--output", "afile/in")])
def test_a_file_where_the_folder_of_runs_should_be_is_an_error(mlo, words):
    Path("afile").write_text("mine")
    code, _, err = mlo(*words)
    assert code == 2
    assert "error: afile: a file, not a folder for runs; give another --output" in err
    assert Path("afile").read_text() == "mine"


def test_a_run_that_has_not_started_is_checked_when_it_is_resumed(ridge, tmp_path, monkeypatch):
    run = Run.create("ridge", ridge.RidgeJob(), tmp_path / "run")

    def check(job):
        raise ConfigError("no such data")

    monkeypatch.setattr(ridge.RidgeJob, "check", check)
    with pytest.raises(ConfigError, match="no such data"):
        Run.open(run.path)
    (run.path / "stages").mkdir()
    Run.open(run.path)


def test_a_folder_is_discarded_where_an_open_lock_cannot_be_deleted(ridge, tmp_path, monkeypatch):
    run = Run.create("ridge", ridge.RidgeJob(), tmp_path / "run")
    unlink = Path.unlink

    def refuse(path, missing_ok=False):  # as Windows does with open files
        if path.name == ".lock":
            raise PermissionError(13, "in use", str(path))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    discard_folder(run.path)
    assert [file.name for file in run.path.iterdir()] == [".lock"]


def test_the_error_names_the_file_that_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        write_atomic(tmp_path / "no" / "such.txt", "text")
    assert raised.value.filename == str(tmp_path / "no" / "such.txt")
