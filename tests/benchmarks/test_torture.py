"""A small part of `python -m benchmarks.torture`, and that it finds what it looks for."""

import os

import pytest

from benchmarks.torture import kills
from benchmarks.torture.damage import damage_trials
from benchmarks.torture.inputs import input_trials
from benchmarks.torture.kills import COMMANDS, kill_trials
from benchmarks.torture.workers import FAILED, preload, run_trials
from mlo.runs import sealed
from mlo.sweeps import experiment
from mlo.training import checkpoint

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="it needs Linux")
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    preload()
    monkeypatch.setattr(experiment, "load_experiment", experiment.load_experiment)


@pytest.fixture
def few(tmp_path):
    def outcomes(attack, goal, *more, seed=0):
        (tmp_path / "home").mkdir()
        return [*run_trials(attack(seed, tmp_path / "home", *more), goal, workers=1)]

    return outcomes


def failures(outcomes):
    return [outcome for outcome in outcomes if outcome.verdict == FAILED]


@pytest.mark.parametrize(("goal", "commands"), [(1, COMMANDS[:1]), pytest.param(40, COMMANDS, marks=slow)])
def test_killed_commands_end_as_unbroken_ones(few, goal, commands):
    outcomes = few(kill_trials, goal, commands)
    assert len(outcomes) >= goal
    assert not failures(outcomes)


@pytest.mark.parametrize("goal", [12, pytest.param(500, marks=slow)])
def test_damage_is_refused_or_changes_nothing(few, goal):
    outcomes = few(damage_trials, goal)
    assert len({outcome.what for outcome in outcomes}) > 4
    assert not failures(outcomes)


@pytest.mark.parametrize("goal", [12, pytest.param(300, marks=slow)])
def test_bad_inputs_end_in_one_error(few, goal):
    outcomes = few(input_trials, goal)
    assert sum(outcome.verdict == "refused" for outcome in outcomes) > goal / 2
    assert not failures(outcomes)


@slow
def test_a_checkpoint_that_is_not_verified_is_found(few, monkeypatch):
    class NoDigest:
        def __init__(self, digest_size):
            self.digest = lambda: bytes(digest_size)

        def update(self, content):
            pass

    monkeypatch.setattr(checkpoint, "hashlib", type("", (), {"blake2b": NoDigest}))
    assert any(each.what == "read a checkpoint" for each in failures(few(damage_trials, 150)))


@slow
def test_files_that_are_written_twice_are_found(few, monkeypatch):
    def write(path, text):
        path.write_text(text[:5])
        path.write_text(text)

    monkeypatch.setattr(sealed, "write_atomic", write)
    monkeypatch.setattr(kills, "MOST_KILLS", 3)
    assert failures(few(kill_trials, 60, COMMANDS[:1]))
