"""Sweeps: a run that fails does not stop the others, and the same command continues a stopped sweep."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from mlo.cli.options import read_sweep
from mlo.errors import ConfigError
from mlo.runs.run import Run
from mlo.sweeps.grid import Planned, check, grid, run_all

MOODY = '''
import os
from pathlib import Path
from typing import Literal

from mlo.errors import ConfigError
from mlo.runs.job import Job

MOODS = "good", "bad", "empty", "lost", "lost later", "resumed", "takes"


class MoodyJob(Job):
    """Ends as its option says."""

    mood: Literal[MOODS] = "good"
    genotype: str = ""

    def check(self):
        super().check()
        if "CHECKED" in os.environ:
            with open(os.environ["CHECKED"], "a") as file:
                print(self.mood, self.seed, self.device, file=file)
        if self.mood == "lost" or (self.mood == "lost later" and os.getpid() != int(os.environ["SWEEP"])):
            raise ConfigError("mood: cannot be found")

    def engine(self):
        raise NotImplementedError

    def run(self, run):
        print("I am", self.mood)
        os.system("echo from below")
        if self.mood == "bad":
            raise ValueError("that is no way\\nto run")
        if self.mood == "empty":
            return None
        if self.mood == "takes":
            (run.path.parent / "good").mkdir()
            (run.path.parent / "good" / "config.yaml").write_text("mine")
        return {"row": {"pid": os.getpid()}}
'''


@pytest.fixture
def moody(register):
    register("moody", MOODY, {"mlo.problems": {"moody": "moody:MoodyJob"}})


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_a_run_that_fails_does_not_stop_the_others(moody, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SWEEP", str(os.getpid()))
    moods = ["bad", "lost later", "resumed"]
    planned = [Planned(tmp_path / mood, "moody", {"mood": mood}) for mood in moods]
    resumed = Run.create("moody", planned[2].load(), planned[2].folder)
    (resumed.path / "stages").mkdir()
    (resumed.path / "run.json").write_text(json.dumps({"job": "moody", "versions": {}}))
    failed = {folder.name: message for folder, message in run_all(planned, workers=2).items()}
    assert failed == {
        "bad": "ValueError: that is no way\nto run",
        "lost later": "mood: cannot be found",
    }
    assert results(tmp_path / "resumed")["row"]["pid"] != os.getpid()
    note, *others = (tmp_path / "resumed" / "log.txt").read_text().splitlines()
    assert "was started with other versions" in note
    assert others == ["I am resumed", "from below", f"finished: {tmp_path / 'resumed'}"]
    assert (tmp_path / "bad" / "log.txt").read_text().startswith("I am bad\nfrom below\nTraceback")
    assert not (tmp_path / "lost later").exists()  # what is refused leaves nothing
    out, err = capfd.readouterr()
    assert "I am" not in out + err
    assert "3/3  " in err


def test_finished_runs_are_left_as_they_are(moody, tmp_path, monkeypatch):
    planned = [Planned(tmp_path / mood, "moody", {"mood": mood}) for mood in ("good", "empty")]
    for plan in planned:
        Run.create(plan.job, plan.load(), plan.folder).execute()
    assert results(tmp_path / "empty") == {}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr("subprocess.Popen", None)  # no process is started
    assert run_all(planned) == {}
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_folder_that_cannot_be_created_is_the_failure_of_its_run(moody, tmp_path, same_process):
    planned = [Planned(tmp_path / "good", "moody"), Planned(tmp_path / "later", "moody", {"mood": "takes"})]
    ((folder, message),) = run_all([planned[1], planned[0]]).items()
    assert folder == planned[0].folder
    assert "the folder is not empty, and nothing is overwritten" in message
    assert (tmp_path / "good" / "config.yaml").read_text() == "mine"


MARK = b" "  # before the first line of metrics: only a resumed run keeps it


def test_a_stopped_sweep_continues_with_the_same_command(ridge, mlo, tmp_path):
    words = ["sweep", "ridge", "--output", "out", "--grid.mode", "[on, off]"]
    words += ["--device", "cpu", "--checkpoint_every", "50", "--steps", "130"]
    first, second = (tmp_path / "out" / f"mode={mode},seed=0" for mode in ("on", "off"))
    metrics = first / "stages" / "train" / "metrics.jsonl"

    def interrupt():
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 6:  # round 60, after a checkpoint at 50
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    code, _, err = mlo(*words)
    assert code == 130
    assert "stopped; continue with: the same command" in err
    saved = [int(path.stem.removeprefix("step-")) for path in metrics.parent.glob("*.pt")]
    assert any(step % 50 for step in saved)  # a checkpoint was written because of the signal
    assert not (metrics.parent / "result.json").exists()
    assert not second.exists()
    metrics.write_bytes(MARK + metrics.read_bytes())
    code, out, err = mlo(*words)
    assert code == 0, err
    assert "2 of 2 runs are finished" in out
    assert "train, mode=off  " in out
    assert (
        metrics.read_bytes() == MARK + (second / "stages/train/metrics.jsonl").read_bytes()
    )  # the mode changes nothing
    assert results(first) == results(second)


def test_a_grid_is_every_combination_with_every_seed(tmp_path):
    planned = grid("j", {"a": 1}, {"rate": [0.5, 1e-3], "h.kind": ["cg", "darts"]}, 2, tmp_path)
    assert [plan.folder.name for plan in planned][:3] == [
        "rate=0.5,h.kind=cg,seed=0",
        "rate=0.5,h.kind=cg,seed=1",
        "rate=0.5,h.kind=darts,seed=0",
    ]
    assert len({plan.folder for plan in planned}) == 8
    assert planned[-1].options == {"a": 1, "rate": 1e-3, "h": {"kind": "darts"}, "seed": 1}


def test_different_values_have_different_folders(tmp_path):
    values = [["a/b"], ["a-b"], "a b", {"kind": "cg"}, "x" * 100, "x" * 101, ""]
    planned = grid("j", {}, {"o": values}, 1, tmp_path)
    names = [plan.folder.name for plan in planned]
    assert len(set(names)) == len(values)
    assert all(len(name) < 70 and "/" not in name for name in names)


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["--rate", "[0.5, 1e-3]"], {"rate": [0.5, 1e-3]}),
        (["--mode", "[on, off]"], {"mode": ["on", "off"]}),
        (["--label", "['1', null, 'a, b']"], {"label": ["1", None, "a, b"]}),
        (["--tags=[[a, b], [c], []]"], {"tags": [["a", "b"], ["c"], []]}),
        (["--start.ridge", "[1, 2]"], {"start.ridge": [1, 2]}),
        (
            ["--hypergradient", "[cg, {kind: darts, radius: 2}]"],
            {"hypergradient": ["cg", {"kind": "darts", "radius": 2}]},
        ),
    ],
)
def test_the_values_of_a_grid_are_read_as_the_option_is(ridge, words, values):
    first, *rest = words
    assert read_sweep(ridge.RidgeJob, [first.replace("--", "--grid."), *rest]) == ({}, values)


def test_grids_are_separated_from_other_options(ridge):
    words = ["--rate", "1", "--grid.steps", "[1, 2]", "--label", "3", "--grid.start.ridge=[3]"]
    assert read_sweep(ridge.RidgeJob, words) == ({"rate": 1, "label": "3"}, {"steps": [1, 2], "start.ridge": [3]})
    with pytest.raises(ConfigError, match="'stray' is not an option"):
        read_sweep(ridge.RidgeJob, [*words, "stray"])


def test_all_errors_are_reported_before_anything_runs(ridge, mlo):
    run = Run.create("ridge", ridge.RidgeJob(rate=0.5, steps=1), Path("out/rate=0.5,seed=0"))
    (run.path / "stages").mkdir()
    Path("out/rate=0.5,seed=1").mkdir()
    Path("out/rate=0.5,seed=1/mine").write_text("")
    code, out, err = mlo("sweep", "ridge", "--output", "out", "--grid.rate", "[0.5, -1, x]", "--seeds", "2")
    assert (code, out) == (2, "")
    assert (
        "out/rate=0.5,seed=0: holds a run with other options (steps is 1 there, 12 here); give another --output" in err
    )
    assert "out/rate=0.5,seed=1: not a run folder" in err
    assert "rate: -1 was given" in err
    assert 'rate: "x" was given' in err
    assert err.count("rate: -1 was given") == 1  # not again for each seed
    assert sorted(os.listdir("out")) == ["rate=0.5,seed=0", "rate=0.5,seed=1"]


def test_jobs_are_checked_before_anything_runs(moody, mlo, monkeypatch, same_process):
    monkeypatch.setenv("CHECKED", "checked")
    line = ["sweep", "moody", "--output", "out", "--seeds", "2", "--grid.mood"]
    code, out, err = mlo(*line, "[empty, lost]")
    assert (code, out) == (2, "")
    assert err == "error: out/mood=lost,seed=0: mood: cannot be found\n"
    assert Path("checked").read_text() == "empty 0 cpu\nlost 0 cpu\n"  # once for all seeds, and not on a GPU
    assert not Path("out").exists()
    code, _, err = mlo("run", "moody", "--mood", "lost", "--output", "out")
    assert (code, err) == (2, "error: mood: cannot be found\n")
    assert not Path("out").exists()
    assert mlo(*line, "[empty]")[0] == 0
    Path("checked").unlink()
    assert mlo(*line, "[empty]")[0] == 0
    assert not Path("checked").exists()  # there is nothing left to start


def test_runs_that_use_a_file_of_the_same_seed_are_checked_once(moody, tmp_path, monkeypatch):
    monkeypatch.setenv("CHECKED", str(tmp_path / "checked"))
    files = [f"runs/{name}/seed-{seed}/genotype.json" for name in ("a", "b") for seed in range(3)]
    check([Planned(tmp_path / f"{n}", "moody", {"seed": n % 3, "genotype": file}) for n, file in enumerate(files)])
    assert (tmp_path / "checked").read_text() == "good 0 cpu\n" * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_reported_before_anything_runs(mlo):
    for command in ("run", "sweep"):
        code, out, err = mlo(command, "ridge", "--device", "cuda:1", "--output", "out")
        assert (code, out) == (2, "")
        assert "device='cuda:1' cannot be used: torch finds no CUDA GPUs here; pass 'cpu' or 'auto'" in err
        assert not Path("out").exists()


def test_the_run_of_another_job_and_a_folder_planned_twice_are_refused(ridge, moody, tmp_path):
    Run.create("ridge", ridge.RidgeJob(), tmp_path / "run")
    (tmp_path / "run" / "stages").mkdir()
    with pytest.raises(ConfigError, match="holds a run of ridge, not of moody"):
        check([Planned(tmp_path / "run", "moody")])
    with pytest.raises(ConfigError, match="new: is planned twice"):
        check([Planned(tmp_path / "new", "moody"), Planned(tmp_path / "new", "moody", {"seed": 1})])
    check([Planned(tmp_path / "run", "ridge", {"seed": 0})])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a sweep needs a folder for its runs: mlo sweep ridge --output DIR"),
        (["--output", "o", "--seed", "3"], "a sweep takes --seeds N"),
        (["--output", "o", "--grid.seed", "[1, 2]"], "a sweep takes --seeds N"),
        (
            ["--output", "o", "--grid.rate", "0.5"],
            "--grid.rate: 0.5 is not a list of values; write --grid.rate '[a, b]'",
        ),
        (["--output", "o", "--grid.rate"], "--grid.rate: has no value; write --grid.rate VALUE"),
        (["--output", "o", "--grid.rate", "[1]", "--grid.rate", "[2]"], "--grid.rate: is given twice"),
        (["--output", "o", "--grid.tags", "[a, b]"], 'tags: "a" was given, but it should be a list'),
        (["--output", "o", "--grid.rat", "[1]"], "rat: unknown option; did you mean rate?"),
        (["--output", "o", "--one-core-each", "--workers", "5000"], "5000 workers, but"),
    ],
)
def test_wrong_options_of_a_sweep_are_reported_and_nothing_runs(mlo, words, message):
    code, out, err = mlo("sweep", "ridge", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert not Path("o").exists()


def test_help_of_a_sweep_lists_its_options_and_the_jobs(mlo):
    code, out, _ = mlo("sweep", "ridge", "--help")
    assert code == 0
    assert all(word in out for word in ("--grid.OPTION", "--seeds", "--one-core-each", "--rate"))
