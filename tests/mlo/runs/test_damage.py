"""Damaged, lost and foreign files in a run folder: nothing is lost, nothing is taken for something else."""

import json
import os
import shutil

import pytest
from interruption import PowerCutError, before_each_step

from mlo.errors import CheckpointError, ConfigError
from mlo.files import remove_temporary, write_atomic
from mlo.runs.folder import read_results
from mlo.runs.run import Run
from mlo.training import checkpoint

STEPS = 12


@pytest.fixture
def job(ridge):
    return ridge.RidgeJob(device="cpu", log_every=2, checkpoint_every=3)


def train(run, before_step=lambda rounds: None, name="train"):
    def build():
        return before_each_step(run.job.engine(), before_step)

    return run.stage(name, build, STEPS, lambda engine: dict(engine.metrics()))


def died(job, path, rounds=10):
    def dies(now):
        if now == rounds:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        train(Run.create("ridge", job, path), dies)
    return path / "stages" / "train"


@pytest.fixture
def expected(job, tmp_path):
    return train(Run.create("ridge", job, tmp_path / "unbroken"))


def saved(stage):
    return sorted(file.name for file in stage.glob("*.pt"))


def test_files_of_the_user_are_neither_read_nor_removed(job, tmp_path, expected):
    stage = died(job, tmp_path / "run")
    names = ["step-best.pt", "step-12.pt", "step-000000099.pt.bak", "step-000000099 (copy).pt", "my step-000000099.pt"]
    for name in names:
        shutil.copy(stage / "step-000000009.pt", stage / name)
    (stage / "step-000000500.pt").mkdir()
    taken = []
    assert train(Run.open(tmp_path / "run"), taken.append) == expected
    assert taken == [9, 10, 11]
    assert saved(stage) == sorted(
        [*names[:2], *names[3:], "step-000000009.pt", "step-000000012.pt", "step-000000500.pt"]
    )


def test_good_checkpoints_are_kept_while_newer_ones_are_damaged(job, tmp_path, expected):
    """The run goes on from an old one; what it then writes must not be removed as older than the damaged ones."""
    stage = died(job, tmp_path / "run")
    (stage / "step-000000009.pt").write_bytes(b"half")
    (stage / "step-000000011.pt").write_bytes(b"half")

    def dies(now):
        if now == 10:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        train(Run.open(tmp_path / "run"), dies)
    assert saved(stage) == ["step-000000006.pt", "step-000000009.pt", "step-000000011.pt"]
    taken = []
    assert train(Run.open(tmp_path / "run"), taken.append) == expected
    assert taken == [9, 10, 11]
    assert saved(stage) == ["step-000000011.pt", "step-000000012.pt"]


def test_if_all_checkpoints_are_damaged_the_stage_starts_again(job, tmp_path, expected, capsys):
    stage = died(job, tmp_path / "run")
    for file in stage.glob("*.pt"):
        file.write_bytes(file.read_bytes()[:-1])
    assert train(Run.open(tmp_path / "run")) == expected
    err = capsys.readouterr().err
    assert err.count("it is damaged") == 2
    assert err.index("the one before it is tried") < err.index("there is none before it")
    assert "use an earlier one" not in err


SLOW = [pytest.param(what, marks=pytest.mark.slow) for what in ("stage", "seed", "round")]


@pytest.mark.parametrize("what", ["run", "configuration", *SLOW])
def test_a_checkpoint_of_another_run_is_not_used(job, tmp_path, what, capsys):
    stage = died(job, tmp_path / "run")
    other = tmp_path / "other"
    model = type(job)
    if what == "stage":
        run = Run.create("ridge", job, other)
        train(run, name="another")
        source = other / "stages" / "another"
    else:
        options = {**job.model_dump(), "seed": 1} if what == "seed" else job.model_dump()
        options |= {"rate": 0.06} if what == "configuration" else {}
        source = died(model(**options), other)
    if what != "run":  # so that only one thing differs
        run_json = other / "run.json"
        about = {
            **json.loads(run_json.read_text()),
            "id": json.loads((tmp_path / "run" / "run.json").read_text())["id"],
        }
        run_json.write_text(json.dumps(about))
        shutil.rmtree(source)
        train(Run.open(other), name="another" if what == "stage" else "train")
    newest = max(source.glob("*.pt"))
    for file in stage.glob("*.pt"):
        file.unlink()
    shutil.copy(newest, stage / ("step-000000010.pt" if what == "round" else newest.name))
    with pytest.raises(CheckpointError, match=rf"another {what}: .* remove it if the stage should start again"):
        train(Run.open(tmp_path / "run"))
    assert len(saved(stage)) == 1


def test_the_checkpoint_before_one_of_another_run_is_used(job, tmp_path, expected, capsys):
    stage = died(job, tmp_path / "run")
    shutil.copy(tmp_path / "unbroken" / "stages" / "train" / "step-000000012.pt", stage)
    assert train(Run.open(tmp_path / "run")) == expected
    assert "step-000000012.pt: this checkpoint is of another run" in capsys.readouterr().err


def test_what_killed_processes_were_writing_is_removed_at_the_next_start(job, tmp_path):
    run = Run.create("ridge", job, tmp_path / "run")
    stage = tmp_path / "run" / "stages" / "train"
    stage.mkdir(parents=True)
    left = [stage / ".step-000000005.pt.123.tmp", stage / ".result.json.9.tmp", run.path / ".run.json.77.tmp"]
    mine = [stage / "a.tmp", stage / ".notes.tmp", run.path / "data.1.tmp"]
    for file in [*left, *mine]:
        file.write_text("half")
    Run.open(run.path).execute()
    assert not any(file.exists() for file in left)
    assert all(file.exists() for file in mine)


def test_temporary_files_behind_a_link_stay(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere" / ".a.1.tmp").touch()
    (tmp_path / "run" / "link").symlink_to(tmp_path / "elsewhere")
    remove_temporary(tmp_path / "run")
    assert (tmp_path / "elsewhere" / ".a.1.tmp").exists()


def test_a_crash_at_any_moment_of_writing_leaves_the_old_file_or_the_new_one(tmp_path):
    """Each call of the system that writing makes is the last one, once: the file is never half."""
    path = tmp_path / "file"
    for name in ("fsync", "replace"):
        for crash in (OSError(28, "no space left"), KeyboardInterrupt()):
            path.write_text("old")
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(os, name, lambda *_, crash=crash: (_ for _ in ()).throw(crash))
                with pytest.raises(type(crash)):
                    write_atomic(path, "new" * 10_000)
            assert path.read_text() == "old"
            assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("files", [0, 1])
def test_a_crash_leaves_no_result_without_its_digest(job, tmp_path, expected, files, monkeypatch):
    run = Run.create("ridge", job, tmp_path / "run")
    written = []

    def write(path, content):
        if len(written) == files:
            raise PowerCutError
        written.append(path)
        write_atomic(path, content)

    with monkeypatch.context() as patched:
        patched.setattr("mlo.runs.sealed.write_atomic", write)
        with pytest.raises(PowerCutError):
            train(run)
    store = run.path / "stages" / "train" / "result.json"
    assert not store.exists()
    assert train(Run.open(run.path)) == expected
    assert (store.parent / "result.json.sha256").exists()


def test_a_damaged_result_of_a_stage_is_refused(job, tmp_path):
    run = Run.create("ridge", job, tmp_path / "run")
    expected = train(run)
    store = run.path / "stages" / "train" / "result.json"
    (store.parent / "result.json.sha256").unlink()
    for content in (b"", b"{", b"\xff", b"[" * 100_000, b"1" * 5000):
        store.write_bytes(content)
        with pytest.raises(ConfigError, match=r"result.json: this result cannot be read .*remove it, and `mlo resume`"):
            train(Run.open(run.path))
    store.unlink()
    taken = []
    assert train(Run.open(run.path), taken.append) == expected
    assert taken == []


def test_a_flipped_digit_in_results_is_found(job, tmp_path):
    run = Run.create("ridge", job, tmp_path / "run")
    run.execute()
    for file in (run.path / "stages" / "train" / "result.json", run.path / "results.json"):
        good = file.read_text()
        digit = next(c for c in good if c in "12345678")
        file.write_text(good.replace(digit, str(int(digit) + 1), 1))
        with pytest.raises(ConfigError, match=f"does not match {file.name}.sha256"):
            Run.open(run.path).execute() if file.name == "result.json" else read_results(run.path)
        file.write_text(good)
    assert read_results(run.path)


def test_options_that_were_lost_or_changed_are_refused(job, tmp_path):
    run = Run.create("ridge", job, tmp_path / "run")
    config = run.path / "config.yaml"
    good = config.read_text()
    config.write_text(good.replace("rate: 0.05\n", "").replace("  dropout: 0.2\n", ""))
    with pytest.raises(
        ConfigError, match=r"config.yaml: rate, start.dropout is missing, .* restore the file, or start"
    ):
        Run.open(run.path)
    for changed in (good.replace("rate: 0.05", "rate: 0.06"), good.replace("terms: 2", "terms: 3")):
        assert changed != good
        config.write_text(changed)
        with pytest.raises(ConfigError, match=r"not those that the run was started with; .*mlo run ridge --config"):
            Run.open(run.path)
    config.write_text(f"# a comment\n{good}")
    Run.open(run.path)
    config.write_text("")
    with pytest.raises(ConfigError, match="and a run's options are all there"):
        Run.open(run.path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", "5", '"x"', "null", '{"job": 5, "versions": {}}', '{"job": "ridge", "versions": 3}', "[" * 10**5],
)
def test_a_damaged_run_json_is_refused(job, tmp_path, content):
    run = Run.create("ridge", job, tmp_path / "run")
    (run.path / "run.json").write_text(content)
    with pytest.raises(ConfigError, match=r"not a run folder: it has no readable run.json"):
        Run.open(run.path)


def test_a_checkpoint_says_whose_it_is(job, tmp_path):
    stage = died(job, tmp_path / "run")
    file = max(stage.glob("*.pt"))
    checkpoint.load(file, {"stage": "train", "seed": 0, "round": 9})
    with pytest.raises(CheckpointError, match="another stage: 'train'"):
        checkpoint.load(file, {"stage": "other"})


def test_a_torn_last_line_of_metrics_is_normal_and_a_damaged_middle_is_reported(job, tmp_path, expected, capsys):
    stage = died(job, tmp_path / "run")
    whole = (tmp_path / "unbroken" / "stages" / "train" / "metrics.jsonl").read_bytes()
    metrics = stage / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + b'{"step": 10, "fi')
    assert len(Run.open(tmp_path / "run").metrics("train")) == 5
    assert "metrics" not in capsys.readouterr().err
    for damaged in (b"\xff\xfe", b"{}", b"[1]", b'{"step": "2"}', b"[" * 100_000, b"", b'{"step": 4, '):
        lines = whole.splitlines()
        lines[1] = damaged
        metrics.write_bytes(b"\n".join([*lines[:-1], b'{"st']))
        assert [line["step"] for line in Run.open(tmp_path / "run").metrics("train")] == [2, 6, 8, 10]
        assert "metrics.jsonl: damaged, and left out: line 2" in capsys.readouterr().err
    assert train(Run.open(tmp_path / "run")) == expected
    assert metrics.read_bytes() == whole.replace(whole.splitlines()[1], damaged)


def test_damaged_seconds_count_as_none(job, tmp_path):
    run = Run.create("ridge", job, tmp_path / "run")
    (run.path / "stages" / "train").mkdir(parents=True)
    for content in ("nan", "inf", "-5", "x", "1" * 5000, "\0"):
        (run.path / "stages" / "train" / "seconds.json").write_text(content)
        assert run.seconds("train") == 0


def test_the_heartbeat_says_when_the_run_was_last_alive(job, tmp_path, monkeypatch):
    run = Run.create("ridge", job, tmp_path / "run")
    beats = []
    monkeypatch.setattr("mlo.runs.stage.HEARTBEAT_SECONDS", 0)

    def note(rounds):
        if rounds:
            beats.append((run.path / "heartbeat").stat().st_mtime_ns)
            os.utime(run.path / "heartbeat", ns=(0, 0))

    train(run, note)
    assert len(beats) == STEPS - 1
    assert all(beats)


@pytest.mark.parametrize("name", ["stages", "stages/train/metrics.jsonl"])
def test_what_is_in_the_place_of_a_file_is_named(job, tmp_path, name):
    run = Run.create("ridge", job, tmp_path / "run")
    place = run.path / name
    place.parent.mkdir(parents=True, exist_ok=True)
    if name in ("stages", "stages/train"):
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "mine").touch()
    with pytest.raises(ConfigError, match=rf"{name}.*: (cannot be used|cannot be read|this result cannot be read)"):
        Run.open(run.path).execute()


def test_a_full_disk_ends_the_run_with_one_line_and_the_run_goes_on_when_there_is_room(job, tmp_path, expected):
    run = Run.create("ridge", job, tmp_path / "run")

    def full(now):
        if now == 7:
            raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(job), "run", lambda job, run: {"train": train(run, full)})
        with pytest.raises(ConfigError, match=r"run: cannot be used \(No space left .*\); make room .*mlo resume"):
            run.execute()
    assert train(Run.open(run.path)) == expected


def test_an_error_of_the_job_about_a_file_elsewhere_stays_what_it_is(job, tmp_path, monkeypatch):
    monkeypatch.setattr(type(job), "run", lambda job, run: (tmp_path / "nowhere").read_text())
    with pytest.raises(FileNotFoundError):
        Run.create("ridge", job, tmp_path / "run").execute()
