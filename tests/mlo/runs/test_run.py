"""Run folders and their stages: what is written, and that a resumed run ends exactly as one that was not stopped."""

import json
import os
import signal
import time

import pytest
import torch
from interruption import PowerCutError, before_each_step

from mlo import Engine
from mlo.errors import ConfigError
from mlo.files import write_atomic
from mlo.ops.rng import derived_seed
from mlo.options.config import validate
from mlo.options.yaml_options import read_yaml
from mlo.runs.checkpoints import Checkpoints
from mlo.runs.folder import discard_folder, locked, read_results
from mlo.runs.keep import Keep
from mlo.runs.run import Run
from mlo.training import checkpoint

STEPS = 12


@pytest.fixture
def job(ridge):
    return ridge.RidgeJob(device="cpu", log_every=2, checkpoint_every=5)


def make(job, path):
    return Run.create("ridge", job, path)


def weights(engine):
    return [p.tolist() for problem in engine.problems.values() for p in problem.module.parameters()]


def train(folder, before_step=lambda rounds: None, result=weights, stop=None):
    """The stage "train" of a run, with something that happens before each step."""

    def build():
        return before_each_step(folder.job.engine(), before_step)

    return folder.stage("train", build, STEPS, result, stop)


def stop_at(rounds):
    def before_step(now):
        if now == rounds:
            raise PowerCutError

    return before_step


def kill_at(rounds, number=signal.SIGTERM):
    def before_step(now):
        if now == rounds:
            os.kill(os.getpid(), number)

    return before_step


def metrics(path):
    return (path / "stages" / "train" / "metrics.jsonl").read_text()


def saved(path):
    return sorted(file.name for file in (path / "stages" / "train").glob("*.pt"))


@pytest.fixture
def unbroken(job, tmp_path):
    """(result, metrics.jsonl) of a run that nothing stopped."""
    return train(make(job, tmp_path / "unbroken")), metrics(tmp_path / "unbroken")


def test_metrics_are_logged_at_their_interval_and_at_the_end(ridge, tmp_path):
    job = ridge.RidgeJob(device="cpu", log_every=5)
    train(make(job, tmp_path / "run"))
    lines = Run.open(tmp_path / "run").metrics("train")
    assert [line["step"] for line in lines] == [5, 10, 12]
    assert set(lines[0]) == {"step", "fit/loss", "ridge/loss", "fit/residual"}
    assert Run.open(tmp_path / "run").metrics("other") == []


def test_tensors_are_read_only_when_something_is_logged(job, tmp_path, monkeypatch):
    reads = []
    read = Engine.metrics
    monkeypatch.setattr(Engine, "metrics", lambda engine: reads.append(engine.rounds) or read(engine))
    train(make(job, tmp_path / "run"))
    assert reads == [2, 4, 6, 8, 10, 12]


def test_nan_is_written_as_null(job, tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "metrics", lambda engine: {"a": float("nan"), "b": 1.0})
    train(make(job, tmp_path / "run"))
    assert metrics(tmp_path / "run").startswith('{"step": 2, "a": null, "b": 1.0}\n')


@pytest.mark.parametrize("rounds", [0, 3, 5, 7, 11])
def test_a_run_that_died_ends_as_an_unbroken_one(job, tmp_path, unbroken, rounds):
    path = tmp_path / "run"
    with pytest.raises(PowerCutError):
        train(make(job, path), stop_at(rounds))
    taken = []
    result = train(Run.open(path), taken.append)
    assert (result, metrics(path)) == unbroken
    assert taken == list(range(rounds // 5 * 5, STEPS))


def test_half_a_line_of_metrics_is_removed(job, tmp_path, unbroken):
    path = tmp_path / "run"
    with pytest.raises(PowerCutError):
        train(make(job, path), stop_at(7))
    file = path / "stages" / "train" / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 8, "fit/lo')
    train(Run.open(path))
    assert metrics(path) == unbroken[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_round_and_writes_a_checkpoint(job, tmp_path, unbroken, number):
    path = tmp_path / "run"
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train(make(job, path), kill_at(7, number))
    assert saved(path) == ["step-000000005.pt", "step-000000008.pt"]
    assert signal.getsignal(number) is before
    assert (train(Run.open(path)), metrics(path)) == unbroken


def test_a_signal_in_the_last_round_stops_too(job, tmp_path, unbroken):
    with pytest.raises(KeyboardInterrupt):
        train(make(job, tmp_path / "run"), kill_at(11))
    taken = []
    assert train(Run.open(tmp_path / "run"), taken.append) == unbroken[0]
    assert taken == []


def test_a_second_signal_stops_at_once(job, tmp_path):
    def twice(now):
        if now == 7:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(make(job, tmp_path / "run"), twice)
    assert saved(tmp_path / "run") == ["step-000000005.pt"]


def test_stop_ends_a_stage_early(job, tmp_path, unbroken):
    asked = []

    def stop(engine):
        asked.append(engine.rounds)
        return engine.rounds == 7

    folder = make(job, tmp_path / "run")
    assert train(folder, result=lambda engine: engine.rounds, stop=stop) == 7
    assert asked == [1, 2, 3, 4, 5, 6, 7]
    assert saved(folder.path) == ["step-000000005.pt", "step-000000007.pt"]
    lines = unbroken[1].splitlines()
    assert metrics(folder.path).splitlines()[:3] == lines[:3]
    assert [line["step"] for line in folder.metrics("train")] == [2, 4, 6, 7]


def test_a_stage_that_ended_early_and_died_before_its_result_trains_no_more(job, tmp_path):
    def dies(engine):
        raise PowerCutError

    def stop(engine):
        return engine.rounds == 7

    with pytest.raises(PowerCutError):
        train(make(job, tmp_path / "run"), result=dies, stop=stop)
    taken = []
    assert train(Run.open(tmp_path / "run"), taken.append, lambda engine: engine.rounds, stop) == 7
    assert taken == []


def test_what_stop_changes_in_a_round_is_in_its_metrics_and_its_checkpoint(job, tmp_path):
    def stop(engine):
        engine.losses["fit"] = torch.tensor(float(engine.rounds))
        return False

    folder = make(job, tmp_path / "run")
    train(folder, stop=stop)
    assert [line["fit/loss"] for line in folder.metrics("train")] == [2, 4, 6, 8, 10, 12]
    assert checkpoint.load(folder.path / "stages" / "train" / "step-000000010.pt")["losses"]["fit"] == 10


def test_a_finished_stage_builds_nothing(job, tmp_path, unbroken):
    def never():
        raise AssertionError("the engine was built again")

    assert Run.open(tmp_path / "unbroken").stage("train", never, STEPS, never) == unbroken[0]


def test_a_result_that_fails_leaves_nothing_and_trains_nothing_again(job, tmp_path, unbroken):
    def failing(engine):
        raise PowerCutError

    with pytest.raises(PowerCutError):
        train(make(job, tmp_path / "run"), result=failing)
    assert not (tmp_path / "run" / "stages" / "train" / "result.json").exists()
    taken = []
    assert train(Run.open(tmp_path / "run"), taken.append) == unbroken[0]
    assert taken == []


@pytest.mark.parametrize("result", [torch.zeros(2), float("nan")])
def test_a_result_that_json_cannot_store_is_an_error(job, tmp_path, result):
    with pytest.raises(
        ConfigError, match=r"stage 'train': its result cannot be stored as JSON .* return finite numbers"
    ):
        train(make(job, tmp_path / "run"), result=lambda engine: result)


def test_the_last_two_checkpoints_are_kept(ridge, tmp_path):
    train(make(ridge.RidgeJob(device="cpu", checkpoint_every=3), tmp_path / "run"))
    assert saved(tmp_path / "run") == ["step-000000009.pt", "step-000000012.pt"]


def kept(path):
    return [int(name[5:14]) for name in saved(path)]


def test_checkpoints_of_every_so_many_rounds_are_kept(ridge, tmp_path):
    job = ridge.RidgeJob(device="cpu", checkpoint_every=2, keep={"last": 1, "every": 4})
    train(make(job, tmp_path / "run"))
    assert kept(tmp_path / "run") == [4, 8, 12]


def test_the_best_checkpoints_by_a_metric_are_kept(ridge, tmp_path):
    job = ridge.RidgeJob(device="cpu", checkpoint_every=1, log_every=1, keep={"last": 1, "best": 3, "by": "ridge/loss"})
    train(make(job, tmp_path / "run"))
    losses = {line["step"]: line["ridge/loss"] for line in Run.open(tmp_path / "run").metrics("train")}
    best = sorted(losses, key=losses.__getitem__)[:3]
    assert kept(tmp_path / "run") == sorted({12, *best})
    assert len({12, *best}) > 2


@pytest.mark.parametrize("rounds", [1, 4, 9])
def test_a_run_that_died_keeps_the_same_checkpoints(ridge, tmp_path, rounds):
    job = ridge.RidgeJob(device="cpu", checkpoint_every=1, keep={"best": 2, "by": "ridge/loss", "every": 5})
    train(make(job, tmp_path / "unbroken"))
    with pytest.raises(PowerCutError):
        train(make(job, tmp_path / "run"), stop_at(rounds))
    train(Run.open(tmp_path / "run"))
    assert kept(tmp_path / "run") == kept(tmp_path / "unbroken")
    scores = [(tmp_path / name / "stages" / "train" / "scores.json").read_text() for name in ("run", "unbroken")]
    assert scores[0] == scores[1]


def test_losses_that_are_not_finite_or_equal_and_damaged_scores(tmp_path):
    store = Checkpoints(tmp_path, {}, Keep(last=1, best=2, by="a"))
    for rounds, score in enumerate([3.0, float("nan"), 1.0, 1.0, -float("inf"), 1.0, 2.0], 1):
        store.save({"rounds": rounds}, score)
    assert sorted(store.faults()) == [tmp_path / f"step-00000000{number}.pt" for number in (3, 4, 7)]


def test_a_run_that_died_right_after_a_checkpoint_knows_its_score(ridge, tmp_path, monkeypatch):
    job = ridge.RidgeJob(device="cpu", checkpoint_every=1, keep={"last": 1, "best": 2, "by": "ridge/loss"})
    train(make(job, tmp_path / "unbroken"))

    def save(path, state, identity):
        written(path, state, identity)
        if state["rounds"] == dies:
            raise PowerCutError

    written = checkpoint.save
    for dies in (1, 5, 11):
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, "save", save)
            with pytest.raises(PowerCutError):
                train(make(job, tmp_path / f"run-{dies}"))
        train(Run.open(tmp_path / f"run-{dies}"))
        assert kept(tmp_path / f"run-{dies}") == kept(tmp_path / "unbroken")
        scores = [tmp_path / name / "stages" / "train" / "scores.json" for name in (f"run-{dies}", "unbroken")]
        assert scores[0].read_text() == scores[1].read_text()


def test_checkpoints_whose_scores_are_lost_are_kept(tmp_path):
    for damage in ("", "[]", '{"x": 1}', '{"3": "a"}', '{"3": NaN}', '{"3": []}', "[" * 5000, None):
        store = Checkpoints(tmp_path, {}, Keep(last=1, best=1, by="a"))
        for rounds, score in enumerate([3.0, 2.0, 4.0, 5.0], 1):
            store.save({"rounds": rounds}, score)
        scores = tmp_path / "scores.json"
        scores.unlink() if damage is None else scores.write_text(damage)
        store.save({"rounds": 5}, 1.0)
        assert sorted(store.faults()) == [tmp_path / f"step-00000000{number}.pt" for number in (2, 4, 5)]
        assert scores.read_text() == '{"5": 1.0}\n'
        for file in tmp_path.iterdir():
            file.unlink()


def test_a_metric_that_a_stage_does_not_have_is_reported_once(ridge, tmp_path, capsys):
    job = ridge.RidgeJob(device="cpu", checkpoint_every=2, keep={"best": 2, "by": "no/loss"})
    train(make(job, tmp_path / "run"))
    assert capsys.readouterr().err.count("note: stage train has no metric no/loss, so keep.best keeps nothing") == 1
    assert kept(tmp_path / "run") == [10, 12]


@pytest.mark.parametrize("keep", [{"best": 2}, {"by": "a"}, {"last": 0}, {"every": 0}, {"best": -1, "by": "a"}])
def test_options_of_what_to_keep_are_checked(ridge, keep):
    with pytest.raises(ConfigError, match="keep"):
        validate(ridge.RidgeJob, {"keep": keep}, "ridge")


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(job, tmp_path, unbroken, capsys):
    path = tmp_path / "run"
    with pytest.raises(PowerCutError):
        train(make(job, path), stop_at(11))
    assert saved(path) == ["step-000000005.pt", "step-000000010.pt"]
    (path / "stages" / "train" / "step-000000010.pt").write_bytes(b"half")
    taken = []
    result = train(Run.open(path), taken.append)
    assert (result, metrics(path), taken[0]) == (*unbroken, 5)
    assert "step-000000010.pt: this file is not a readable checkpoint" in capsys.readouterr().err


def test_a_stage_does_not_depend_on_the_stages_before_it(job, tmp_path, unbroken):
    folder = make(job, tmp_path / "run")
    folder.stage("first", folder.job.engine, 3, weights)
    assert train(folder) == unbroken[0]
    assert len({derived_seed(seed, name) for seed in (0, 1) for name in ("a", "b")}) == 4


def test_two_stages_of_the_same_name_are_an_error(job, tmp_path):
    folder = make(job, tmp_path / "run")
    folder.stage("twice", job.engine, 1, weights)
    with pytest.raises(ConfigError, match="two stages of this job are named 'twice'"):
        folder.stage("twice", job.engine, 1, weights)


def test_the_folder_records_job_options_and_versions(job, tmp_path):
    folder = make(job, tmp_path / "run")
    assert validate(type(job), read_yaml(folder.path / "config.yaml"), "ridge") == job
    about = json.loads((folder.path / "run.json").read_text())
    assert about["job"] == "ridge"
    assert about["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert Run.open(folder.path).job == job


def test_a_run_of_other_versions_is_resumed_with_a_note(job, tmp_path, capsys):
    folder = make(job, tmp_path / "run")
    about = json.loads((folder.path / "run.json").read_text())
    about["versions"]["torch"] = "1.0"
    (folder.path / "run.json").write_text(json.dumps(about))
    Run.open(folder.path)
    assert "numbers may differ: torch 1.0 then" in capsys.readouterr().err


def test_the_folder_is_named_after_problem_and_time(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = make(job, None).path
    assert path.is_dir()
    assert path.match("runs/ridge-[0-9]*-[0-9]*")


def test_runs_that_start_in_the_same_second_have_different_folders(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len({make(job, None).path for _ in range(4)}) == 4


def test_a_folder_that_is_not_empty_is_not_overwritten(job, tmp_path):
    folder = make(job, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r"nothing is overwritten; .*mlo resume .*run\) or give another --output"):
        make(job, folder.path)
    assert (tmp_path / "run" / "config.yaml").read_text() == "mine"


def test_an_empty_folder_is_used(job, tmp_path):
    (tmp_path / "empty").mkdir()
    assert make(job, tmp_path / "empty").path == tmp_path / "empty"


def test_a_file_where_the_folder_should_be_is_an_error(job, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"the folder cannot be created there .* another --output"):
        make(job, tmp_path / "file")


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_only_a_run_folder_can_be_resumed(tmp_path, content):
    if content:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigError, match="not a run folder"):
        Run.open(tmp_path)


def test_only_a_run_that_has_not_started_is_discarded(job, tmp_path):
    fresh = make(job, tmp_path / "fresh")
    discard_folder(fresh.path)
    assert not fresh.path.exists()
    started = make(job, tmp_path / "started")
    with pytest.raises(PowerCutError):
        train(started, stop_at(0))
    discard_folder(started.path)
    assert (started.path / "config.yaml").exists()


def test_a_failed_write_leaves_only_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full(*_):
        raise OSError(28, "no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, "new")
    assert (path.read_text(), os.listdir(tmp_path)) == ("old", ["file"])


def test_a_file_is_written_where_folders_cannot_be_flushed(tmp_path, monkeypatch):
    opened = []
    monkeypatch.delattr(os, "O_DIRECTORY")  # as on Windows
    monkeypatch.setattr(os, "open", lambda *given: opened.append(given))
    write_atomic(tmp_path / "file", "text")
    assert ((tmp_path / "file").read_text(), opened) == ("text", [])


def test_checkpoints_hold_the_whole_engine(job, tmp_path):
    train(make(job, tmp_path / "run"))
    state = checkpoint.load(tmp_path / "run" / "stages" / "train" / "step-000000012.pt")
    assert state["rounds"] == STEPS


def test_one_process_at_a_time_runs_in_a_folder(job, tmp_path):
    folder = make(job, tmp_path / "run")
    with locked(folder.path), pytest.raises(ConfigError, match="another process is running in this folder"):
        locked(folder.path).__enter__()
    with locked(folder.path):
        pass


def test_a_stage_runs_with_the_jobs_number_of_threads(ridge, tmp_path):
    before = torch.get_num_threads()
    try:
        seen = train(
            make(ridge.RidgeJob(device="cpu", threads=2), tmp_path / "run"), result=lambda _: torch.get_num_threads()
        )
    finally:
        torch.set_num_threads(before)
    assert seen == 2


def burn(seconds: float) -> None:
    """Compute for a while: on the CPU a stage's seconds are those of its computing."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_the_seconds_of_a_stage_add_up_over_interruptions(job, tmp_path):
    assert make(job, tmp_path / "run").seconds("train") == 0
    nap = 0.02

    def stop(now):
        burn(nap)
        if now == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(Run.open(tmp_path / "run"), stop)
    first = Run.open(tmp_path / "run").seconds("train")
    assert first >= 8 * nap
    burn(0.5)
    started = time.process_time()
    train(Run.open(tmp_path / "run"), lambda rounds: burn(nap))
    second = Run.open(tmp_path / "run").seconds("train") - first
    assert 4 * nap <= second <= time.process_time() - started  # neither the pause nor the rounds before it once more


def test_results_mark_a_run_as_finished(job, tmp_path):
    folder = make(job, tmp_path / "run")
    assert read_results(folder.path) is None
    folder.execute()
    found = read_results(folder.path)
    assert found == {"train": json.loads((folder.path / "stages" / "train" / "result.json").read_text())}
    Run.open(folder.path).execute()
    assert read_results(folder.path) == found


def test_a_run_that_was_stopped_has_no_results(job, tmp_path, monkeypatch):
    folder = make(job, tmp_path / "run")
    monkeypatch.setattr(type(job), "run", lambda job, run: train(run, kill_at(7)))
    with pytest.raises(KeyboardInterrupt):
        folder.execute()
    assert read_results(folder.path) is None


@pytest.mark.parametrize(
    "found", [3, {"row": 1.0}, {"row": {"m": None}}, {"row": {"m": [1]}}, {"row": {"m": float("nan")}}]
)
def test_results_of_the_wrong_form_are_an_error(job, tmp_path, monkeypatch, found):
    monkeypatch.setattr(type(job), "run", lambda job, run: found)
    with pytest.raises(ConfigError, match=r"cannot be stored .* return \{row: \{measure: value\}\}"):
        make(job, tmp_path / "run").execute()
    assert read_results(tmp_path / "run") is None


def test_a_job_may_return_nothing_and_damaged_results_are_an_error(job, tmp_path, monkeypatch):
    monkeypatch.setattr(type(job), "run", lambda job, run: None)
    make(job, tmp_path / "run").execute()
    assert read_results(tmp_path / "run") == {}
    (tmp_path / "run" / "results.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot be read .* delete it and run `mlo resume"):
        read_results(tmp_path / "run")
