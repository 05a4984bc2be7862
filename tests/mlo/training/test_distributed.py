"""Two real processes: they train as one would on the global batch, stop together, and write once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import two_processes
from engine_state import same
from two_processes import EVALUATION, STEPS

import mlo
from mlo.ops import distributed
from mlo.training import checkpoint

pytestmark = [pytest.mark.processes, pytest.mark.timeout(1200)]  # where other work has the cores
ROOT = Path(__file__).parents[3]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

started: list[subprocess.Popen[str]] = []


@pytest.fixture(scope="module", autouse=True)
def none_left():
    """End what a failed test has left running."""
    yield
    for process in started:
        if process.poll() is None:
            process.terminate()


def torchrun(folder, *words):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [*TORCHRUN, *map(str, words)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    started.append(process)
    return process


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with a run `stopped`, the name of its checkpoint, and what its processes wrote to standard error."""
    folder = tmp_path_factory.mktemp("processes")
    stage = folder / "stopped" / "stages" / "train"
    process = torchrun(folder, "-m", "mlo", *EVALUATION, "--output", "stopped")
    while not ((stage / "metrics.jsonl").exists() and (stage / "metrics.jsonl").stat().st_size):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)  # a busy wait would take a core from the processes
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=400)
    return folder, [checkpoint.stem for checkpoint in stage.glob("*.pt")], err


@pytest.fixture(scope="module")
def ended(stopped):
    """The folder, and the output and errors of the processes that did all in two_processes.py, resuming there."""
    folder, _, _ = stopped
    process = torchrun(folder, ROOT / "tests" / "two_processes.py", folder)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return folder, out, err


@pytest.fixture(scope="module")
def seen(ended):
    """What both processes saw."""
    folder, _, _ = ended
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
def test_two_processes_train_as_one_on_the_whole_batch(seen, dtype, tolerance):
    one = two_processes.trained(getattr(torch, dtype))
    for process in seen:
        for name, value in process[dtype].items():
            torch.testing.assert_close(value, one[name], rtol=tolerance, atol=tolerance)
            assert torch.equal(value, seen[0][dtype][name])


def test_buffers_of_the_first_process_are_in_all(seen):
    first, second = (process["normalized"] for process in seen)
    assert same(first, second)
    assert first["2.running_mean"].any()


def test_a_resumed_training_ends_in_the_same_bits_in_each_process(seen):
    for process in seen:
        unbroken, resumed = process["resumed"]
        assert same(unbroken, resumed)
        assert same(unbroken["state"], seen[0]["resumed"][0]["state"])
    draws = [process["resumed"][0]["next draw"] for process in seen]
    assert draws[0] != draws[1]


def test_a_state_of_two_processes_is_not_for_one(seen):
    engine = mlo.Engine(two_processes.problem(two_processes.network(torch.nn.Dropout(0.5))), device="cpu")
    with pytest.raises(mlo.CheckpointError, match=r"in 2 process.*start 2 .torchrun --nproc-per-node 2"):
        engine.load_state_dict(seen[0]["resumed"][0]["state"])


def test_a_weight_that_one_process_reaches_moves_in_both_and_one_that_none_reaches_in_neither(seen):
    first, second = (process["partly_reached"] for process in seen)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[1], torch.ones_like(first[1]))
    assert torch.equal(first[2], torch.ones_like(first[2]))


def test_a_bad_loss_in_one_process_ends_both_in_the_same_round(seen):
    for first, second in zip(*(process["bad_loss"] for process in seen), strict=True):
        assert first["error"].startswith("problem 'classify': its loss is nan at its step 3")
        assert same(first, second)
        assert all(torch.equal(first["after"][name], value) for name, value in first["before"].items())


def test_several_levels_are_refused(seen):
    for process in seen:
        assert process["two_levels"].startswith(
            "problem 'weighted' reads 'weight', but several processes can train only"
        )


def test_the_first_process_acts_for_all(seen):
    assert [process["of_the_first"] for process in seen] == [["from 0", True, "the disk is full", False, [0, 1]]] * 2


def test_a_job_that_does_not_share_out_its_batches_is_refused(mlo, monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(distributed, "on_main", lambda function: function())
    for words in (["run", "ridge", "--output", "here"], ["list"]):
        code, out, err = mlo(*words)
        assert (code, out) == (2, "")
        assert (
            "start it without torchrun: mlo run ridge" in err
            or "torchrun can start `mlo run` and `mlo resume` only" in err
        )
    assert not Path("here").exists()


def test_each_process_has_the_gpu_of_its_number(monkeypatch):
    chosen = []
    monkeypatch.setattr(distributed, "world", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.own_device("cuda") == torch.device("cuda", 1)
    assert chosen == [1]
    assert distributed.own_device("cpu") == torch.device("cpu")
    with pytest.raises(mlo.ConfigError, match="each of several processes has its own GPU; write auto"):
        distributed.own_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(mlo.ConfigError, match="torchrun --nproc-per-node 2"):
        distributed.own_device("cuda")


def test_a_stopped_and_resumed_evaluation_ends_in_the_bits_of_an_unbroken_one(stopped, ended):
    _, saved, err = stopped
    assert err.count("stopped; continue with: torchrun --nproc-per-node 2 -m mlo resume stopped") == 1, err
    (checkpoint_name,) = saved  # written because of the signal, for none else was due
    assert checkpoint_name < f"step-{STEPS:09}"
    folder, out, err = ended
    assert [out.count(f"finished: {name}") for name in ("stopped", "unbroken")] == [1, 1]
    assert err.count(f"{STEPS}/{STEPS}") == 2  # once for each run, by the first process alone
    runs = [folder / name / "stages" / "train" for name in ("stopped", "unbroken")]
    for file in ("metrics.jsonl", "result.json"):
        assert (runs[0] / file).read_bytes() == (runs[1] / file).read_bytes()
    assert [json.loads(line)["step"] for line in (runs[0] / "metrics.jsonl").open()] == list(range(1, STEPS + 1))
    states = [checkpoint.load(run / f"step-{STEPS:09}.pt") for run in runs]
    assert same(*states)
    assert len(states[0]["others"]) == 1
