"""Experiments of a third party: their runs, cost and pages."""

import re
from pathlib import Path

import pytest
import torch

from mlo.errors import ConfigError, MloError
from mlo.runs.folder import create_folder
from mlo.sweeps import cost as costs
from mlo.sweeps.cost import Cost, cost, duration, measure
from mlo.sweeps.experiment import Wanted, chosen_scale, load_experiment, plan
from mlo.sweeps.grid import Planned, report_failures, run_all

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


def test_an_experiment_is_reproduced_with_one_command(dropout, mlo, same_process):
    code, out, err = mlo("reproduce", "dropout", "--output", "out", "--seeds", "2")
    assert code == 0, err
    assert out.startswith("out/small: 4 runs: 0 finished, 0 started, 4 not started\nmeasuring")
    assert re.search(
        r"what is left takes about \d+ s on 1 process \(0\.01 CPU-hours\)\n4 of 4 runs are finished\n", out
    )
    page = Path("out/small/pages/dropout/page.md")
    assert out.endswith(f"page: {page}\n")
    assert re.fullmatch(r"small \{'dropout-0.0': \{0: .*, 1: .*\}, 'dropout-0.5': \{0: .*\}\}", page.read_text())
    assert Path("out/small/dropout-0.5/seed-1/config.yaml").read_text().count("seed: 1") == 1
    page.unlink()
    code, out, _ = mlo("reproduce", "dropout", "--output", "out", "--seeds", "1")  # nothing is left to do
    assert (code, out.splitlines()[0]) == (0, "out/small: 2 runs: 2 finished, 0 started, 0 not started")
    assert "measuring" not in out
    assert page.exists()
    assert mlo("compare", "out")[1].count("start.dropout=") == 2


def test_no_page_is_written_if_a_run_failed(dropout, mlo, same_process):
    code, out, err = mlo("reproduce", "dropout", "--scale", "broken", "--output", "out")
    assert code == 1
    assert "0 of 2 runs are finished" in out
    for rate in ("0.0", "0.5"):
        assert f"failed: out/broken/dropout-{rate}/seed-0: RuntimeError: nothing came of it" in err
    assert "no pages are written until all runs are finished" in err
    assert not Path("out/broken/pages").exists()


def test_estimate_prints_only_the_cost(dropout, mlo, same_process):
    code, out, _ = mlo("reproduce", "dropout", "--estimate")
    assert code == 0
    assert "what is left takes about" in out
    assert not Path("runs").exists()


def test_list_shows_experiments(dropout, mlo):
    lines = [" ".join(line.split()) for line in mlo("list")[1].splitlines()]
    assert "dropout Whether dropout helps." in lines
    assert "Experiments: mlo reproduce NAME" in lines
    text = mlo("--help")[1]
    assert all(f" {command} " in text for command in ("sweep", "compare", "reproduce"))


@pytest.mark.parametrize(
    ("words", "message"),
    [(["dropuot"], "did you mean dropout?"), (["dropout", "--scale", "smal"], "--scale: 'smal' is not known among")],
)
def test_an_unknown_experiment_or_scale_is_an_error(dropout, mlo, words, message):
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
    before = torch.get_num_threads()
    try:
        assert measure(TwoStages(device="cpu", threads=3)) == Cost(100 * 2 + 7, 3 * (100 * 2 + 7), cuda=False)
    finally:
        torch.set_num_threads(before)


def test_a_job_has_one_stage_by_default(ridge):
    job = ridge.RidgeJob(device="cpu", steps=5)
    ((name, build, rounds),) = job.stages()
    assert (name, build().rounds, rounds) == ("train", 0, 5)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.1, "1 s"), (59, "59 s"), (60, "1 min"), (9600, "2 h 40 min"), (7200, "2 h"), (3 * 86400 + 7300, "3 days 2 h")],
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


def test_gpus_are_counted_in_days_and_cores_in_hours():
    assert str(Cost(9600, 19200, cuda=False, processes=2)) == "about 2 h 40 min on 2 processes (5.3 CPU-hours)"
    assert str(Cost(86400, 86400, cuda=True)) == "about 1 day on 1 process (1 GPU-days)"


def test_the_cost_is_that_of_each_kind_shared_among_processes(ridge, tmp_path, monkeypatch):
    measured = {"quick": Cost(10, 10, cuda=False), "slow": Cost(100, 400, cuda=False)}

    def measure_all(firsts, workers, one_core_each):
        return {key: measured[key] for key in firsts}

    monkeypatch.setattr(costs, "_measure_all", measure_all)
    left = {
        "quick": [Planned(tmp_path / "quick" / f"seed-{seed}", "ridge") for seed in (1, 2, 3)],
        "slow": [Planned(tmp_path / "slow" / f"seed-{seed}", "ridge") for seed in (0, 1)],
        "done": [],
    }
    assert cost(left, 2, one_core_each=False) == Cost(115, 3 * 10 + 2 * 100 * 4, cuda=False, processes=2)
    assert cost(left, 2, one_core_each=True).core_seconds == 230
    assert cost(left, 50, one_core_each=False) == Cost(100, 830, cuda=False, processes=5)  # no sooner than the longest


def test_each_kind_of_run_is_measured_in_a_process_and_as_many_at_once_as_run_later(
    ridge, tmp_path, monkeypatch, same_process
):
    monkeypatch.setattr(costs, "measure", lambda job: Cost(job.steps, job.steps * job.threads, cuda=False))
    started = []
    run_processes = costs.run_processes
    monkeypatch.setattr(
        costs, "run_processes", lambda *given: started.append((given[0], *given[3:])) or run_processes(*given)
    )
    left = {f"{n}": [Planned(tmp_path / f"{n}", "ridge", {"steps": n, "threads": 2 * n})] for n in (1, 2, 3)}
    assert cost(left, 2, one_core_each=False) == Cost(3, 2 + 8 + 18, cuda=False, processes=2)
    assert started == [(["1", "2", "3"], 2, False)]


def test_a_failure_while_measuring_names_the_kind_of_run(ridge, tmp_path, monkeypatch, same_process):
    for error, message in ((MloError("no GPU"), "no GPU"), (RuntimeError("odd"), "RuntimeError: odd")):
        monkeypatch.setattr(costs, "measure", lambda job, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(MloError, match=f"measuring the cost of slow failed: {message}"):
            cost({"slow": [Planned(tmp_path / "slow" / "seed-0", "ridge")]}, 1, one_core_each=False)


def test_the_process_that_measures_prints_one_line_or_its_error(ridge, tmp_path, monkeypatch, capsys):
    folder = create_folder("ridge", ridge.RidgeJob(), tmp_path / "run")
    monkeypatch.setattr(costs, "measure", lambda job: Cost(job.steps, 3, cuda=False))
    costs.main(folder)
    assert capsys.readouterr().out == "[12, 3, false, 1]\n"
    monkeypatch.setattr(costs, "measure", lambda job: (_ for _ in ()).throw(MloError("no GPU")))
    with pytest.raises(SystemExit, match=r"^error: no GPU$"):
        costs.main(folder)


def test_runs_are_measured_in_a_process_on_one_core(ridge, tmp_path):
    left = {"one": [Planned(tmp_path / "one" / "seed-0", "ridge", {"device": "cpu", "steps": 2})]}
    found = cost(left, 1, one_core_each=True)
    assert found.seconds == found.core_seconds > 0
    assert not any(path.is_relative_to(tmp_path / "one") for path in tmp_path.rglob("*"))


def test_a_used_file_is_the_same_however_the_output_is_spelled(dropout, tmp_path, monkeypatch):
    made = load_experiment("dropout")
    made.runs = lambda scale: TWO
    monkeypatch.chdir(tmp_path)
    one, other = (plan(made, "small", 1, output)["second"][0] for output in (Path("out"), tmp_path / "out"))
    assert one.options == other.options == {"where": str(tmp_path / "out/small/first/seed-0/file"), "seed": 0}


def needs_its_file(job):
    if job.where.name == "file" and not job.where.exists():
        raise ConfigError("where: does not exist")
    if job.label == "bad":
        raise ConfigError("label: is bad")


ONE = {"first": Wanted("ridge", {})}
TWO = {**ONE, "second": Wanted("ridge", {}, {"where": ("first", "file")})}


def test_a_file_that_a_run_has_yet_to_write_is_not_missing(dropout, ridge, tmp_path, monkeypatch):
    monkeypatch.setattr(ridge.RidgeJob, "check", needs_its_file)
    made = load_experiment("dropout")
    made.runs = lambda scale: TWO
    planned = plan(made, "small", 2, tmp_path)
    assert [*planned] == ["first", "second"]
    assert [run.uses for runs in planned.values() for run in runs] == [(), (), ("where",), ("where",)]


def test_all_runs_of_an_experiment_are_checked_before_anything_is_measured(dropout, ridge, mlo, monkeypatch):
    monkeypatch.setattr(ridge.RidgeJob, "check", needs_its_file)
    runs = {**TWO, "third": Wanted("ridge", {"label": "bad"})}
    monkeypatch.setattr("dropout.Dropout.runs", lambda experiment, scale: runs)
    code, out, err = mlo("reproduce", "dropout", "--output", "out", "--seeds", "2")
    assert (code, out, err) == (2, "", "error: out/small/third/seed-0: label: is bad\n")
    for seed in (0, 1):  # the files of the others are there now, so the second kind of run can be checked as well
        file = Path(f"out/small/first/seed-{seed}/file")
        file.parent.mkdir(parents=True)
        file.write_text("")
        (file.parent / "run.json").write_text("{}")
    runs = {"second": runs["second"]._replace(options={"label": "bad"}), "first": Wanted("ridge", {"label": "bad"})}
    err = mlo("reproduce", "dropout", "--output", "out", "--seeds", "1")[2]
    assert "out/small/second/seed-0: label: is bad" in err


def test_a_run_whose_files_are_missing_is_not_started(dropout, ridge, tmp_path, monkeypatch, same_process):
    done = []

    def run(job, run):
        done.append(run.path)
        if job.seed == 1 and job.label != "second":
            raise RuntimeError("no")
        (run.path / "file").write_text("")

    monkeypatch.setattr(ridge.RidgeJob, "run", run)
    made = load_experiment("dropout")
    made.runs = lambda scale: {"second": Wanted("ridge", {"label": "second"}, TWO["second"].uses), **ONE}
    planned = plan(made, "small", 2, tmp_path)
    first, second = planned["first"], planned["second"]
    failed = run_all([*second, *first])
    assert done == [first[0].folder, first[1].folder, second[0].folder]
    assert [*failed] == [first[1].folder, second[1].folder]
    assert failed[second[1].folder].startswith(f"not started: {first[1].folder / 'file'} is missing")
    assert not second[1].folder.exists()
    assert report_failures(failed, 4)
