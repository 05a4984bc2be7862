"""The command `mlo` as a user meets it, with a job from a package that this repository does not know."""

import json
import signal
from pathlib import Path
from typing import Annotated

import pytest
import yaml
from command_process import CommandProcess
from engine_state import same

from mlo.cli.options import read_options
from mlo.hypergradient import Estimator
from mlo.options import registry
from mlo.options.config import Config, Registered
from mlo.training import checkpoint


def options(folder):
    return yaml.safe_load(Path(folder, "config.yaml").read_text())


def test_a_run_fills_its_folder(mlo):
    code, out, err = mlo("run", "ridge", "--device", "cpu", "--output", "here")
    assert (code, out) == (0, "run folder: here\nfinished: here\n")
    assert "train 12/12" in err
    assert json.loads(Path("here/stages/train/result.json").read_text()).keys() >= {"fit/loss", "ridge/loss"}


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (["--rate", "0.5"], {"rate": 0.5}),
        (["--rate=1e-3"], {"rate": 1e-3}),
        (["--rate", "1"], {"rate": 1.0}),
        (["--log-every", "3", "--checkpoint_every", "4"], {"log_every": 3, "checkpoint_every": 4}),
        (["--label", "3"], {"label": "3"}),
        (["--tags", "[a, b]"], {"tags": ["a", "b"]}),
        (["--mode", "off"], {"mode": "off"}),
        (["--where", "2024"], {"where": "2024"}),
        (["--where", "null"], {"where": None}),
        (["--label", "a: b"], {"label": "a: b"}),
        (["--label", "[a"], {"label": "[a"}),
        (["--start.ridge", "2"], {"start": {"ridge": 2.0, "dropout": 0.2}}),
        (["--start", "{ridge: 2}", "--start.dropout", "0"], {"start": {"ridge": 2.0, "dropout": 0.0}}),
        (["--hypergradient", "first_order"], {"hypergradient": {"kind": "first_order"}}),
        (["--hypergradient", "{kind: darts, radius: 2}"], {"hypergradient": {"kind": "darts", "radius": 2.0}}),
        (["--hypergradient", '{"kind": "darts", "radius": 2}'], {"hypergradient": {"kind": "darts", "radius": 2.0}}),
        (
            ["--hypergradient.radius", "3", "--hypergradient", "darts"],
            {"hypergradient": {"kind": "darts", "radius": 3.0}},
        ),
        (
            ["--hypergradient", "darts", "--hypergradient.radius", "3"],
            {"hypergradient": {"kind": "darts", "radius": 3.0}},
        ),
        (
            ["--hypergradient.warm_start", "--hypergradient.terms", "5", "--hypergradient.product", "central"],
            {
                "hypergradient": {
                    "kind": "neumann",
                    "fresh_batch": False,
                    "terms": 5,
                    "rate": None,
                    "warm_start": True,
                    "product": {"kind": "central", "autocast": False, "radius": 0.01},
                }
            },
        ),
    ],
)
def test_what_is_written_on_the_command_line_is_what_the_job_gets(mlo, ridge, monkeypatch, words, changed):
    monkeypatch.setattr(ridge.RidgeJob, "run", lambda job, run: None)
    assert mlo("run", "ridge", "--output", "usual")[0] == 0
    assert mlo("run", "ridge", "--output", "changed", *words)[0] == 0
    assert options("changed") == options("usual") | changed


def test_a_choice_whose_type_has_its_names_too_is_read_as_a_mapping():
    class Loose(Config):
        hypergradient: Annotated[Estimator | str, Registered(registry.ESTIMATORS)] = "cg"

    given = read_options(Loose, ["--hypergradient", "{kind: cg, iterations: 3}"])
    assert given == {"hypergradient": {"kind": "cg", "iterations": 3}}


def test_the_command_line_beats_the_file_and_the_file_the_defaults(mlo):
    Path("some.yaml").write_text("rate: 0.3\nsteps: 2\nhypergradient: {kind: cg, iterations: 3}\n")
    words = ("--config", "some.yaml", "--steps", "1", "--hypergradient.damping", "0.5", "--output", "out")
    assert mlo("run", "ridge", *words)[0] == 0
    given = options("out")
    assert (given["rate"], given["steps"], given["label"]) == (0.3, 1, "plain")
    assert [given["hypergradient"][key] for key in ("kind", "iterations", "damping")] == ["cg", 3, 0.5]


def test_the_config_of_a_run_makes_the_same_run(mlo):
    mlo("run", "ridge", "--seed", "3", "--hypergradient", "cg", "--output", "one")
    mlo("run", "ridge", "--config", "one/config.yaml", "--output", "two")
    for file in ("config.yaml", "stages/train/metrics.jsonl", "stages/train/result.json"):
        assert Path("one", file).read_text() == Path("two", file).read_text()


def test_all_errors_are_reported_at_once_and_nothing_is_written(mlo):
    code, out, err = mlo("run", "ridge", "--hypergradent", "cg", "--rate", "x", "--start.ridg", "3", "--output", "out")
    assert (code, out) == (2, "")
    assert "ridge: 3 invalid options" in err
    assert "hypergradent: unknown option; did you mean hypergradient?" in err
    assert 'rate: "x" was given, but it should be a valid number' in err
    assert "start.ridg: unknown option; did you mean start.ridge?" in err
    assert "`mlo run ridge --help-all` shows all options" in err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "rigde"], "'rigde' is not known among mlo.problems; did you mean ridge?"),
        (["run", "ridge", "stray"], "'stray' is not an option; write --option VALUE"),
        (["run", "ridge", "--rate", "-0.5"], "-0.5 was given, but it should be greater than 0"),
        (["run", "ridge", "--start", "{a"], '--start: "{a" is not valid YAML: '),
        (["run", "ridge", "--tags", "a"], 'tags: "a" was given, but it should be a list'),
        (
            ["run", "ridge", "--tags", "[a,", "b]"],
            "'b]' is not an option; write --option VALUE, and quote a VALUE that has spaces",
        ),
        (["run", "ridge", "--mode", "onn"], "did you mean on?"),
        (["run", "ridge", "--rate"], "--rate: has no value; write --rate VALUE"),
        (["run", "ridge", "--label", "--rate", "1"], "--label: has no value; write --label VALUE"),
        (["run", "ridge", "--start.ridge", "--rate=1"], "--start.ridge: has no value; write --start.ridge VALUE"),
        (
            ["run", "ridge", "--hypergradient.product.radius"],
            "--hypergradient.product.radius: has no value; write --hypergradient.product.radius VALUE",
        ),
        (
            ["run", "ridge", "--hypergradient.radius"],  # which the first kind has not
            "--hypergradient.radius: has no value; write --hypergradient.radius VALUE",
        ),
        (["run", "ridge", "--start"], "start: true was given, but it should be a mapping"),
        (["run", "ridge", "--steps=5", "--steps", "6"], "--steps: is given twice, as 5 and as 6; give it once"),
        (["run", "ridge", "--log-every=5", "--log_every=6"], "--log_every: is given twice, as 5 and as 6"),
        (["run", "ridge", "--rat"], "rat: unknown option; did you mean rate?"),
        (
            ["run", "ridge", "--hypergradient", "nuemann"],
            "'nuemann' is not known among mlo.estimators; did you mean neumann?",
        ),
        (["run", "ridge", "--config", "none.yaml"], "none.yaml: cannot be read"),
        (["run", "--rate", "3", "ridge"], "the name comes first: mlo run NAME --rate"),
        (["resume", "nowhere"], "nowhere: there is no such folder"),
        (["resume", "out", "--steps", "20"], "mlo resume takes no --steps 20: a run keeps the options"),
        (["resume"], "Missing argument 'RUN_DIR'"),
        (["graph", "rigde"], "'rigde' is not known among mlo.problems; did you mean ridge?"),
        (["swep"], "Did you mean 'sweep'?"),
        (["sweep", "ridge", "--output", "o", "--seeds", "0"], "Invalid value for '--seeds': Input should be greater"),
        (["compare", "o", "--fromat", "csv"], "No such option: --fromat"),
    ],
)
def test_what_is_wrong_on_a_command_line_is_reported_without_a_traceback(mlo, words, message):
    code, _, err = mlo(*words)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err


def test_a_folder_that_holds_something_is_not_written_over(mlo):
    mlo("run", "ridge", "--steps", "1", "--output", "out")
    code, _, err = mlo("run", "ridge", "--steps", "2", "--output", "out")
    assert (code, options("out")["steps"]) == (2, 1)
    assert "mlo resume out" in err


def test_an_engine_that_cannot_be_built_leaves_no_folder(mlo):
    code, out, err = mlo("run", "ridge", "--device", "moon", "--output", "out")
    assert (code, out) == (2, "")
    assert "moon" in err
    assert not Path("out").exists()


def test_a_loss_that_is_not_finite_ends_the_run_in_words(mlo):
    code, _, err = mlo("run", "ridge", "--device", "cpu", "--start.ridge", "1e30", "--steps", "50", "--output", "out")
    assert code == 1
    assert err.splitlines()[-1].startswith(
        "error: problem 'ridge': its loss is inf at its step 1"
    )  # 'fit' is huge, but finite
    assert "Traceback" not in err
    assert Path("out/config.yaml").exists()


def test_resume_of_a_finished_run_changes_nothing(mlo):
    mlo("run", "ridge", "--output", "out")
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert mlo("resume", "out")[:2] == (0, "finished: out\n")
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before


def test_resume_of_a_folder_of_runs_lists_them(mlo):
    mlo("run", "ridge", "--steps", "1", "--output", "runs/a")
    for run in ("s/b", *(f"t{number}" for number in range(8))):
        Path("runs", run).mkdir(parents=True)
        Path("runs", run, "run.json").write_bytes(Path("runs/a/run.json").read_bytes())
    code, _, err = mlo("resume", "runs")
    assert code == 2
    assert "error: runs: not a run folder: " in err
    assert err.endswith(f"; it contains the runs runs/s/b, {', '.join(f'runs/t{n}' for n in range(7))} and 2 more\n")
    (line,) = mlo("resume", "runs/s")[2].splitlines()
    assert line.endswith("; it contains the runs runs/s/b")
    Path("runs/a").rename("runs/s/a")
    assert mlo("resume", "runs/s")[2].endswith("; it contains the runs runs/s/b, runs/s/a (finished)\n")


def test_help_without_a_job_lists_the_commands(mlo):
    assert "mlo run NAME --help" in " ".join(mlo("run", "--help")[1].split())
    assert mlo("run")[0] == 2
    assert all(word in mlo("--help")[1] for word in ("run", "resume", "list", "graph", "--version"))


def test_list_shows_what_there_is_and_what_is_broken(mlo, register):
    register("half", "import no_such_module", {"mlo.problems": {"half": "half:Job"}})
    code, out, _ = mlo("list")
    assert code == 0
    lines = {" ".join(line.split()) for line in out.splitlines()}
    assert lines >= {
        "Jobs: mlo run NAME",
        "Estimators: --hypergradient NAME",
        "ridge The strength of a ridge regression.",
    }
    assert "Curvature products: --hypergradient.product NAME" in lines
    assert any(line.startswith("half (broken: 'half' is registered in mlo.problems as half:Job") for line in lines)
    names = {line.partition(" ")[0] for line in lines}
    assert names >= {"cg", "darts", "first_order", "neumann", "one_step", "exact", "central"}


def test_a_class_that_is_no_job_is_an_error(mlo, register):
    register("thing", "class Thing: pass", {"mlo.problems": {"thing": "thing:Thing"}})
    code, _, err = mlo("run", "thing")
    assert code == 2
    assert "register a class derived from mlo.runs.job.Job" in err


def test_graph_shows_who_reads_whom(mlo):
    code, out, _ = mlo("graph", "ridge", "--start.ridge", "2")
    assert code == 0
    assert "fit" in out
    assert "ridge" in out
    assert not Path("runs").exists()


def test_version(mlo):
    code, out, _ = mlo("--version")
    assert code == 0
    assert out.startswith("mlo 0.1.0, torch ")


MARK = b" "  # before the first line of metrics: only a run that goes on keeps it, one that begins again does not


def test_a_third_partys_job_that_was_stopped_or_killed_ends_as_an_unbroken_one(mlo, ridge, tmp_path):
    words = ("run", "ridge", "--device", "cpu", "--steps", "400", "--checkpoint_every", "10", "--output")
    path = [Path(ridge.__file__).parent]
    codes = {}
    for number in (signal.SIGTERM, signal.SIGKILL):
        stage = tmp_path / number.name / "stages" / "train"
        stopped = CommandProcess(*words, number.name, folder=tmp_path, logs=tmp_path / f"{number.name}-logs", path=path)
        stopped.wait_until(lambda stage=stage: list(stage.glob("*.pt")))
        _, err = stopped.send(number)
        codes[number] = stopped.code
        assert ("stopped; continue with: mlo resume SIGTERM" in err) == (number == signal.SIGTERM)
        assert not (stage / "result.json").exists()
        (stage / "metrics.jsonl").write_bytes(MARK + (stage / "metrics.jsonl").read_bytes())
    assert codes == {signal.SIGTERM: 130, signal.SIGKILL: -9}
    for line in (("resume", "SIGTERM"), ("resume", "SIGKILL"), (*words, "unbroken")):
        code, _, err = mlo(*line)
        assert code == 0, err
        assert ("train: continues after round " in err) == (line[0] == "resume")
    for number in codes:
        assert (tmp_path / number.name / "stages" / "train" / "metrics.jsonl").read_bytes().startswith(MARK)
    runs = [tmp_path / name / "stages" / "train" for name in ("SIGTERM", "SIGKILL", "unbroken")]
    for file in ("metrics.jsonl", "result.json"):
        found = [(run / file).read_bytes().removeprefix(MARK) for run in runs]
        assert found[0] == found[1] == found[2]
    states = [checkpoint.load(run / "step-000000400.pt") for run in runs]
    assert same(states[0], states[2])
    assert same(states[1], states[2])


def test_check_names_what_is_damaged_in_a_run_folder(mlo):
    mlo("run", "ridge", "--device", "cpu", "--checkpoint-every", "5", "--output", "r")
    code, out, _ = mlo("check", "r")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()[:-1]] == [
        ["good", f"r/{name}"]
        for name in (
            "config.yaml",
            "stages/train/metrics.jsonl",
            "stages/train/step-000000010.pt",
            "stages/train/step-000000012.pt",
            "stages/train/result.json",
            "results.json",
        )
    ]
    assert out.splitlines()[-1].startswith("finished, last alive 20")
    for name in ("metrics.jsonl", "step-000000012.pt", "result.json"):
        file = Path("r/stages/train", name)
        file.write_bytes(b"x" + file.read_bytes()[1:])
    Path("r/results.json").unlink()
    code, out, _ = mlo("check", "r")
    assert code == 1
    damaged = [line for line in out.splitlines() if line.startswith("DAMAGED  r/stages/train/")]
    assert [line.partition("train/")[2].partition(":")[0] for line in damaged] == [
        "metrics.jsonl",
        "step-000000012.pt",
        "result.json",
    ]
    assert out.splitlines()[-1].startswith("not finished")
    code, _, err = mlo("check", ".")
    assert (code, err.startswith("error: .: not a run folder")) == (2, True)


def test_what_the_user_gave_is_cut_in_errors(mlo):
    for words in (["run", "ridge", "--steps", "x" * 10**5], ["run", "ridge", "y" * 10**5], ["z" * 10**5]):
        code, _, err = mlo(*words)
        assert code == 2
        assert err.startswith("error: ")
        assert len(err) < 5000
