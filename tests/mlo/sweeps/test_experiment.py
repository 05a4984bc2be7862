"""Experiments of a third party: their runs, what they cost, and their pages."""

import re
from pathlib import Path

import pytest

from mlo.errors import ConfigError, MloError
from mlo.runs import cost as costs
from mlo.runs.cost import estimate_seconds
from mlo.sweeps import experiment
from mlo.sweeps.experiment import Cost, Wanted, chosen_scale, cost, duration, load_experiment, plan
from mlo.sweeps.grid import Failure, Planned, report_failures
from mlo.sweeps.workers import Failed

DROPOUT = '''
from mlo.sweeps.experiment import Experiment
from ridge_package import RidgeJob


class FailingJob(RidgeJob):
    """Trains, and fails."""

    def run(self, run):
        raise RuntimeError("nothing came of it")


class Dropout(Experiment):
    """Whether dropout helps."""

    scales = {"small": 2, "broken": 1}

    def runs(self, scale):
        job = "failing" if scale == "broken" else "ridge"
        return {f"dropout-{rate}": (job, {"start": {"dropout": rate}, "device": "cpu"}) for rate in (0.0, 0.5)}

    def write(self, scale, results, folder):
        page = folder / "page.md"
        losses = {key: {n: rows["train"]["ridge/loss"] for n, rows in seeds.items()} for key, seeds in results.items()}
        page.write_text(f"{scale} {losses}")
        return [page]
'''


@pytest.fixture
def dropout(ridge, register):
    points = {"mlo.experiments": {"dropout": "dropout:Dropout"}, "mlo.problems": {"failing": "dropout:FailingJob"}}
    register("dropout", DROPOUT, points)


def test_an_experiment_is_reproduced_with_one_command(dropout, mlo):
    code, out, err = mlo("reproduce", "dropout", "--output", "out", "--seeds", "3")
    assert code == 0, err
    assert out.startswith("out/small: 6 runs, 0 finished, 0 begun, 6 not begun\nmeasuring")
    assert re.search(
        r"what is to do takes about \d+ s on 1 process \(0\.01 CPU-hours\)\n6 of 6 runs are finished\n", out
    )
    page = Path("out/small/pages/dropout/page.md")
    assert out.endswith(f"page: {page}\n")
    assert re.fullmatch(r"small \{'dropout-0.0': \{0: .*, 1: .*, 2: .*\}, 'dropout-0.5': \{0: .*\}\}", page.read_text())
    assert Path("out/small/dropout-0.5/seed-2/config.yaml").read_text().count("seed: 2") == 1
    page.unlink()
    code, out, _ = mlo("reproduce", "dropout", "--output", "out", "--seeds", "2")  # of other seeds, none is left to do
    assert (code, out.splitlines()[0]) == (0, "out/small: 4 runs, 4 finished, 0 begun, 0 not begun")
    assert "measuring" not in out
    assert page.exists()
    assert mlo("compare", "out")[1].count("start.dropout=") == 2


@pytest.fixture
def here(monkeypatch):
    """Measure in this process, which saves the start of another."""
    monkeypatch.setattr(
        experiment, "in_processes", lambda function, items, *_: [(item, function(item)) for item in items]
    )


def test_no_page_is_written_from_a_part(dropout, mlo, here):
    code, out, err = mlo("reproduce", "dropout", "--scale", "broken", "--output", "out")
    assert code == 1
    assert "0 of 2 runs are finished" in out
    for rate in ("0.0", "0.5"):
        assert f"failed: out/broken/dropout-{rate}/seed-0: RuntimeError: nothing came of it" in err
    assert "no page is written from a part of the runs" in err
    assert not Path("out/broken/pages").exists()


def test_the_cost_is_told_alone(dropout, mlo, here):
    code, out, _ = mlo("reproduce", "dropout", "--estimate")
    assert code == 0
    assert "what is to do takes about" in out
    assert not Path("runs").exists()


def test_list_tells_of_experiments(dropout, mlo):
    lines = [" ".join(line.split()) for line in mlo("list")[1].splitlines()]
    assert "dropout Whether dropout helps." in lines
    assert "Experiments: mlo reproduce NAME" in lines
    told = mlo("--help")[1]
    assert all(f" {command} " in told for command in ("sweep", "compare", "reproduce"))


@pytest.mark.parametrize(
    ("words", "message"),
    [(["dropuot"], "did you mean dropout?"), (["dropout", "--scale", "smal"], "--scale: 'smal' is not known among")],
)
def test_what_is_not_there_is_told(dropout, mlo, words, message):
    code, out, err = mlo("reproduce", *words)
    assert (code, out) == (2, "")
    assert message in err


def test_a_key_that_names_no_folder_and_a_class_that_is_no_experiment_are_refused(dropout, register, tmp_path):
    made = load_experiment("dropout")
    assert chosen_scale(made, None) == "small"
    made.runs = lambda scale: {"../a": ("ridge", {})}
    with pytest.raises(ConfigError, match=r"'\.\./a' cannot name a folder"):
        plan(made, "small", 1, tmp_path)
    register("thing", "class Thing: pass", {"mlo.experiments": {"thing": "thing:Thing"}})
    with pytest.raises(ConfigError, match=r"register a class derived from mlo\.sweeps\.experiment\.Experiment"):
        load_experiment("thing")


def test_a_run_costs_the_median_of_its_rounds_times_their_number(ridge, monkeypatch):
    class TwoStages(ridge.RidgeJob):
        def stages(self):
            yield "search", self.engine, 100
            yield "train", self.engine, 1

    times = iter([0, 50, 50, 51, 51, 59, 59, 61, 100, 107])  # rounds of 50 (not counted), 1, 8 and 2 s; one of 7 s
    monkeypatch.setattr(costs, "_now", lambda: next(times))
    assert estimate_seconds(TwoStages(device="cpu")) == 100 * 2 + 7


def test_the_main_stage_is_what_a_job_is_rehearsed_by(ridge):
    job = ridge.RidgeJob(device="cpu", steps=5)
    ((name, build, rounds),) = job.stages()
    assert (name, build().rounds, rounds) == ("train", 0, 5)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.1, "1 s"), (59, "59 s"), (60, "1 min"), (9600, "2 h 40 min"), (7200, "2 h"), (3 * 86400 + 7300, "3 days 2 h")],
)
def test_times_are_told_in_words(seconds, words):
    assert duration(seconds) == words


def test_a_card_is_paid_by_the_day_and_cores_by_the_hour():
    assert str(Cost(9600, 2, 19200, cuda=False)) == "about 2 h 40 min on 2 processes (5.3 CPU-hours)"
    assert str(Cost(86400, 1, 86400, cuda=True)) == "about 1 day on 1 process (1 GPU-days)"


def test_runs_are_paid_by_kind_shared_among_processes_and_by_the_threads_of_each(ridge, tmp_path, monkeypatch):
    def measured(function, items, *_):
        for item in items:
            seconds, threads = (10, 1) if item.folder.parent.name == "quick" else (100, 4)
            yield item, experiment._Measured(seconds, threads, cuda=False)

    monkeypatch.setattr(experiment, "in_processes", measured)
    left = {
        "quick": [Planned(tmp_path / "quick" / f"seed-{seed}", "ridge") for seed in (1, 2, 3)],
        "slow": [Planned(tmp_path / "slow" / f"seed-{seed}", "ridge") for seed in (0, 1)],
        "done": [],
    }
    assert cost(left, 2, one_core_each=False) == Cost(115, 2, 3 * 10 + 2 * 100 * 4, cuda=False)
    assert cost(left, 2, one_core_each=True).core_seconds == 230
    assert cost(left, 50, one_core_each=False) == Cost(100, 5, 830, cuda=False)  # no sooner than the longest


def test_a_rehearsal_that_fails_is_told(ridge, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "in_processes", lambda function, items, *_: [(items[0], Failed("no card"))])
    with pytest.raises(MloError, match="slow: its rehearsal failed: no card"):
        cost({"slow": [Planned(tmp_path / "slow" / "seed-0", "ridge")]}, 1, one_core_each=False)


def test_a_used_file_is_the_same_however_the_output_is_spelled(dropout, tmp_path, monkeypatch):
    made = load_experiment("dropout")
    made.runs = lambda scale: {
        "first": Wanted("ridge", {}),
        "second": Wanted("ridge", {}, {"where": ("first", "file")}),
    }
    monkeypatch.chdir(tmp_path)
    one, other = (plan(made, "small", 1, output)["second"][0] for output in (Path("out"), tmp_path / "out"))
    assert one.options == other.options == {"where": str(tmp_path / "out/small/first/seed-0/file"), "seed": 0}


def test_a_file_that_a_run_is_still_to_write_is_not_missed(dropout, ridge, tmp_path, monkeypatch):
    def check(job):
        if job.where.name == "file" and not job.where.exists():
            raise ConfigError("where: is not there")

    monkeypatch.setattr(ridge.RidgeJob, "check", check)
    made = load_experiment("dropout")
    made.runs = lambda scale: {
        "first": Wanted("ridge", {}),
        "second": Wanted("ridge", {}, {"where": ("first", "file")}),
    }
    assert [*plan(made, "small", 2, tmp_path)] == ["first", "second"]


def test_a_run_whose_files_are_not_there_is_not_begun_but_told(dropout, tmp_path, monkeypatch):
    made = load_experiment("dropout")
    wanted = {"first": Wanted("ridge", {}), "second": Wanted("ridge", {}, {"where": ("first", "file")})}
    made.runs = lambda scale: wanted
    planned = plan(made, "small", 2, tmp_path)
    first, second = planned["first"], planned["second"]
    done = []

    def run_all(runs, workers, one_core_each):
        done.append(list(runs))
        if len(done) == 1:  # the run of seed 0 makes its file, and that of seed 1 fails
            first[0].folder.mkdir(parents=True)
            (first[0].folder / "file").write_text("")
            return [Failure(first[1].folder, "no")]
        return []

    monkeypatch.setattr(experiment, "run_all", run_all)
    failures = experiment.do(made, "small", planned, 1, one_core_each=False)
    assert done == [first, [second[0]]]
    assert [failure.folder for failure in failures] == [first[1].folder, second[1].folder]
    assert failures[1].message.startswith(f"not begun, for {first[1].folder / 'file'} is not there")
    assert report_failures(failures, 4)
