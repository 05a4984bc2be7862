"""Many runs at once: what fails or dies takes no other with it, and the same command goes on with what was stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mlo.cli.options import part_grid, read_grid
from mlo.errors import ConfigError
from mlo.runs.run import Run
from mlo.sweeps.grid import Planned, check, execute, grid, run_all
from mlo.sweeps.workers import in_processes, own_cores

MOODY = '''
import os
import signal
import sys
import time
from typing import Literal

import torch

from mlo.errors import ConfigError, GraphError
from mlo.runs.job import Job


class OddError(Exception):
    def __init__(self, one, two):
        super().__init__("odd")


class MoodyJob(Job):
    """Ends as it is told to."""

    mood: Literal["good", "bad", "ours", "odd", "leaves", "dies", "interrupts", "empty", "lost"] = "good"
    genotype: str = ""

    def check(self):
        super().check()
        if "ASKED" in os.environ:
            with open(os.environ["ASKED"], "a") as file:
                print(self.mood, self.seed, self.device, file=file)
        if self.mood == "lost":
            raise ConfigError("mood: is nowhere to be found")

    def engine(self):
        raise NotImplementedError

    def run(self, run):
        print("I am", self.mood)
        os.system("echo from below")
        if self.mood == "bad":
            raise ValueError("that is no way\\nto run")
        if self.mood == "ours":
            raise GraphError("in words")
        if self.mood == "odd":
            raise OddError(1, 2)
        if self.mood == "leaves":
            sys.exit(3)
        if self.mood == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.mood == "interrupts":
            raise KeyboardInterrupt
        if self.mood == "empty":
            return None
        cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
        if self.threads:
            torch.set_num_threads(self.threads)
        time.sleep(0.2)
        return {"row": {"pid": os.getpid(), "core": min(cores), "cores": len(cores), "threads": threads}}
'''


@pytest.fixture
def moody(register):
    register("moody", MOODY, {"mlo.problems": {"moody": "moody:MoodyJob"}})


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_a_run_that_fails_or_dies_takes_no_other_with_it(moody, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    moods = ["good", "bad", "ours", "odd", "leaves", "dies", "interrupts", "empty", "good", "good"]
    planned = [Planned(tmp_path / f"{n}-{mood}", "moody", {"mood": mood, "threads": 3}) for n, mood in enumerate(moods)]
    workers = min(2, len(os.sched_getaffinity(0)))
    failures = {failure.folder.name: failure.message for failure in run_all(planned, workers, one_core_each=True)}
    assert failures == {
        "1-bad": "ValueError: that is no way\nto run",
        "2-ours": "in words",
        "3-odd": "OddError: odd",
        "4-leaves": "SystemExit: 3",
        "5-dies": "its process died (killed, out of memory, or crashed in native code)",
        "6-interrupts": "it was stopped from outside",
    }
    assert results(tmp_path / "7-empty") == {}
    good = [results(tmp_path / name)["row"] for name in ("0-good", "8-good", "9-good")]
    assert {(row["cores"], row["threads"]) for row in good} == {(1, 1)}
    assert len({row["core"] for row in good}) <= workers
    assert os.getpid() not in {row["pid"] for row in good}
    assert os.environ["OMP_NUM_THREADS"] == "2"
    bad = (tmp_path / "1-bad" / "log.txt").read_text()
    assert bad.startswith("I am bad\nfrom below\nTraceback")
    assert (tmp_path / "2-ours" / "log.txt").read_text() == "I am ours\nfrom below\nerror: in words\n"
    out, err = capfd.readouterr()
    assert "I am" not in out + err
    assert "10/10  " in err
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if "good" in str(path)}
    left = [plan for plan in planned if plan.options["mood"] in ("good", "empty")]
    began = time.monotonic()
    assert run_all(left) == []
    assert time.monotonic() - began < 1  # no process was started
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_threads_of_a_run_do_not_hold_for_the_next(moody, tmp_path):
    before = torch.get_num_threads()
    execute(Planned(tmp_path / "run", "moody", {"threads": before + 1}))
    assert torch.get_num_threads() == before


def test_what_is_noted_of_a_run_that_goes_on_is_in_its_log(moody, tmp_path, capfd):
    plan = Planned(tmp_path / "run", "moody")
    Run.create(plan.job, plan.made(), plan.folder)
    (plan.folder / "stages").mkdir()
    (plan.folder / "run.json").write_text(json.dumps({"job": "moody", "versions": {}}))
    assert run_all([plan]) == []
    out, err = capfd.readouterr()
    assert "other versions" not in out + err
    noted, *others = (plan.folder / "log.txt").read_text().splitlines()
    assert "was begun with other versions" in noted
    assert others == ["I am good", "from below"]


def process(folder, sites, *words):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sites, os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        [sys.executable, "-m", "mlo", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


MARK = b" "  # before the first line of metrics: only a run that goes on keeps it


def logged(stage):
    """Rounds that a stage has told of."""
    metrics = stage / "metrics.jsonl"
    return 10 * metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def test_a_sweep_that_was_stopped_goes_on_with_the_same_command(ridge, tmp_path):
    words = ["sweep", "ridge", "--output", "out", "--grid.mode", "[on, off]", "--workers", "2"]
    words += ["--device", "cpu", "--checkpoint_every", "50", "--steps", "230"]
    sites = [str(Path(ridge.__file__).parent)]
    folders = [tmp_path / "out" / f"mode={mode},seed=0" for mode in ("on", "off")]
    stages = [folder / "stages" / "train" for folder in folders]
    stopped = process(tmp_path, sites, *words)
    while not any(logged(stage) >= 60 for stage in stages):  # well after a checkpoint, which is written every 50
        assert stopped.poll() is None, stopped.communicate()
        time.sleep(0.01)
    os.killpg(stopped.pid, signal.SIGINT)  # as a terminal does: the workers must not take it for a second one
    _, err = stopped.communicate(timeout=60)
    assert stopped.returncode == 130
    assert "stopped; go on with: the same command" in err
    saved = [int(path.stem.removeprefix("step-")) for stage in stages for path in stage.glob("*.pt")]
    assert any(step % 50 for step in saved)  # a checkpoint was written because of the signal
    assert not any((stage / "result.json").exists() for stage in stages)
    begun = [stage / "metrics.jsonl" for stage in stages if (stage / "metrics.jsonl").exists()]
    for metrics in begun:
        metrics.write_bytes(MARK + metrics.read_bytes())
    again = process(tmp_path, sites, *words)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert "2 of 2 runs are finished" in out
    assert "train, mode=off  1" in out
    assert all(metrics.read_bytes().startswith(MARK) for metrics in begun)
    one, other = ((stage / "metrics.jsonl").read_bytes().removeprefix(MARK) for stage in stages)
    assert one == other  # the mode changes nothing, and they were stopped at different rounds
    assert results(folders[0]) == results(folders[1])


def test_a_grid_is_every_combination_with_every_seed(tmp_path):
    planned = grid("j", {"a": 1}, {"rate": [0.5, 1e-3], "h.kind": ["cg", "darts"]}, 2, tmp_path)
    assert [plan.folder.name for plan in planned][:3] == [
        "rate=0.5,h.kind=cg,seed=0",
        "rate=0.5,h.kind=cg,seed=1",
        "rate=0.5,h.kind=darts,seed=0",
    ]
    assert len({plan.folder for plan in planned}) == 8
    assert planned[-1].options == {"a": 1, "rate": 1e-3, "h": {"kind": "darts"}, "seed": 1}


def test_values_that_would_share_a_folders_name_do_not(tmp_path):
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
        (["--label", "[1, null, 'a, b', [x]]"], {"label": ["1", "null", "a, b", "[x]"]}),
        (["--tags=[[a, b], [c], []]"], {"tags": [["a", "b"], ["c"], []]}),
        (["--start.ridge", "[1, 2]"], {"start.ridge": [1, 2]}),
        (
            ["--hypergradient", "[cg, {kind: darts, radius: 2}]"],
            {"hypergradient": ["cg", {"kind": "darts", "radius": 2}]},
        ),
    ],
)
def test_the_values_of_a_grid_are_read_as_the_option_is(ridge, words, values):
    if "null" in words[-1]:
        values = {"label": ["1", None, "a, b", "[x]"]}
    assert read_grid(ridge.RidgeJob, words) == values


def test_grids_are_parted_from_other_options():
    words = ["--a", "1", "--grid.b", "[1, 2]", "--c", "--grid.d.e=[3]", "stray"]
    assert part_grid(words) == (["--a", "1", "--c"], ["--b", "[1, 2]", "--d.e=[3]", "stray"])


def test_all_faults_are_told_before_anything_runs(ridge, mlo):
    mlo("run", "ridge", "--rate", "0.5", "--steps", "1", "--output", "out/rate=0.5,seed=0")
    Path("out/rate=0.5,seed=1").mkdir()
    Path("out/rate=0.5,seed=1/mine").write_text("")
    code, out, err = mlo("sweep", "ridge", "--output", "out", "--grid.rate", "[0.5, -1, x]", "--seeds", "2")
    assert (code, out) == (2, "")
    assert (
        "out/rate=0.5,seed=0: holds a run with other options (steps is 1 there, 12 here); give another --output" in err
    )
    assert "out/rate=0.5,seed=1: is no run folder" in err
    assert "rate: -1 was given" in err
    assert 'rate: "x" was given' in err
    assert err.count("rate: -1 was given") == 1  # not again for each seed
    assert sorted(os.listdir("out")) == ["rate=0.5,seed=0", "rate=0.5,seed=1"]


def test_what_a_job_looks_for_in_vain_is_told_before_anything_runs(moody, mlo, monkeypatch):
    monkeypatch.setenv("ASKED", "asked")
    line = ["sweep", "moody", "--output", "out", "--seeds", "2", "--grid.mood"]
    code, out, err = mlo(*line, "[empty, lost]")
    assert (code, out) == (2, "")
    assert err == "error: out/mood=lost,seed=0: mood: is nowhere to be found\n"
    assert Path("asked").read_text() == "empty 0 cpu\nlost 0 cpu\n"  # once for all seeds, and on no card
    assert not Path("out").exists()
    code, _, err = mlo("run", "moody", "--mood", "lost", "--output", "out")
    assert (code, err) == (2, "error: mood: is nowhere to be found\n")
    assert not Path("out").exists()
    assert mlo(*line, "[empty]")[0] == 0
    Path("asked").unlink()
    assert mlo(*line, "[empty]")[0] == 0
    assert not Path("asked").exists()  # there is nothing left to begin


def test_runs_that_each_take_a_file_of_their_own_seed_are_asked_once(moody, tmp_path, monkeypatch):
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    files = [f"runs/{name}/seed-{seed}/genotype.json" for name in ("a", "b") for seed in range(3)]
    check([Planned(tmp_path / f"{n}", "moody", {"seed": n % 3, "genotype": file}) for n, file in enumerate(files)])
    assert (tmp_path / "asked").read_text() == "good 0 cpu\n" * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants a machine without a card")
def test_a_card_that_is_not_there_is_told_before_anything_runs(mlo):
    for command in ("run", "sweep"):
        code, out, err = mlo(command, "ridge", "--device", "cuda:1", "--output", "out")
        assert (code, out) == (2, "")
        assert "device='cuda:1' cannot be used: torch finds no CUDA GPUs here; pass 'cpu', 'cuda' or " in err
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
        (["--output", "o", "--grid.rate", "0.5"], '--grid.rate: "0.5" is no list of values; write --grid.rate'),
        (["--output", "o", "--grid.rate"], "--grid.rate: has no values; write --grid.rate '[a, b]'"),
        (["--output", "o", "--grid.rate", "[1]", "--grid.rate", "[2]"], "--grid.rate: is given twice"),
        (["--output", "o", "--grid.tags", "[a, b]"], "each value is a list itself; write --grid.tags '[[a], [a, b]]'"),
        (["--output", "o", "--grid.rat", "[1]"], "rat: unknown option; did you mean rate?"),
        (["--output", "o", "--one-core-each", "--workers", "5000"], "5000 workers, but"),
    ],
)
def test_what_is_wrong_with_a_sweep_is_told_and_nothing_is_run(mlo, words, message):
    code, out, err = mlo("sweep", "ridge", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert not Path("o").exists()


def test_help_of_a_sweep_tells_how_and_the_options(mlo):
    code, out, _ = mlo("sweep", "ridge", "--help")
    assert code == 0
    assert all(word in out for word in ("--grid.OPTION", "--seeds", "--one-core-each", "--rate"))


def test_cores_that_a_system_does_not_share_out_are_told(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    with pytest.raises(ConfigError, match="this system does not let a process be kept on a core"):
        own_cores(1)


def test_nothing_to_do_starts_no_process():
    assert list(in_processes(print, [])) == []
