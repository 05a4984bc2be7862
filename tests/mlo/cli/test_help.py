"""What `mlo run NAME --help` and shell completion show, and that neither imports torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlo.options import registry
from mlo.runs.job import load_job

LIGHT = '''
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from mlo.options.config import Config, EstimatorOption
from mlo.runs.job import Job


class Start(Config):
    ridge: float = Field(0.1, gt=0, description="the ridge at the start; more about it")
    dropout: float = 0.2


class LightJob(Job):
    """A job that needs no torch to be described.

    It has a second paragraph.
    """

    main_options: ClassVar = {"Method": ("hypergradient", "mode"), "Where it starts": ("start", "seed")}
    presets: ClassVar = {"strong": Path(__file__).parent / "strong.yaml"}
    examples: ClassVar = ("mlo run light", "mlo run light --mode off", "mlo sweep light --output runs/s")

    start: Start = Start()
    mode: Literal["on", "off"] = "on"
    fast: bool = False
    hypergradient: EstimatorOption = Field("neumann", description="how to differentiate")

    def engine(self):
        raise NotImplementedError
'''
WITHOUT_TORCH = """
import sys
from mlo.__main__ import main
sys.argv[0] = "mlo"
try:
    main()
finally:
    heavy = {"torch", "numpy", "rich", "matplotlib"} & set(sys.modules)
    print(f"imported: {', '.join(sorted(heavy)) or 'nothing'}", file=sys.stderr)
"""


@pytest.fixture
def light(register):
    """The folder of a package with a job named `light`."""
    site = register("light_package", LIGHT, {"mlo.problems": {"light": "light_package:LightJob"}})
    (site / "strong.yaml").write_text("# A strong ridge.\nstart: {ridge: 0.7, dropout: 0.4}\n")
    return site


def in_a_process(site, *words, **environment):
    """(standard output, standard error) of a command line in a new process."""
    paths = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words],
        env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "100", **environment},
        cwd=site,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout, done.stderr


def completion(line):
    """The environment in which a shell asks for the completions at the end of a command line."""
    number = str(len(line.split(" ")) - 1)
    return {"COMP_WORDS": line, "COMP_CWORD": number, "_MLO_COMPLETE": "complete_bash"}


@pytest.fixture
def completed(light, mlo, monkeypatch):
    """The completions at the end of a command line."""

    def complete(line):
        for name, value in completion(line).items():
            monkeypatch.setenv(name, value)
        code, out, err = mlo()
        assert (code, err) == (0, "")
        return out.split()

    return complete


def squeezed(text):
    return " ".join(text.split())


def test_help_shows_the_main_options_under_their_headings(light):
    out, err = in_a_process(light, "run", "light", "--help")
    assert err == "imported: nothing\n"
    text = squeezed(out)
    for part in (
        "Usage: mlo run light [--OPTION VALUE]... A job that needs no torch to be described. Method:",
        "Method: --hypergradient how to differentiate (default neumann)",
        "--mode on | off (default on) Where it starts:",
        "--start.ridge the ridge at the start (default 0.1)",
        "--start.dropout float (default 0.2) --seed ",
        "Options of mlo run: --preset strong A strong ridge. --config FILE.yaml ",
        "Examples: mlo run light mlo run light --mode off mlo run light --help-all shows all options.",
    ):
        assert part in text
    assert "--fast" not in text
    assert "second paragraph" not in text


@pytest.mark.parametrize("command", ["sweep", "graph"])
def test_other_commands_show_the_same_options_with_their_own(light, command):
    out, err = in_a_process(light, command, "light", "--help")
    assert err == "imported: nothing\n"
    text = squeezed(out)
    assert f"Usage: mlo {command} light" in text
    assert "--start.ridge the ridge at the start" in text
    assert ("--one-core-each" in text, "Examples: mlo sweep light --output runs/s" in text) == (command == "sweep",) * 2


def test_help_of_a_job_that_names_no_main_options_shows_those_that_it_declares(mlo):
    code, out, _ = mlo("run", "ridge", "--help")
    assert code == 0
    assert "The strength of a ridge regression." in out
    text = squeezed(out)
    for line in (
        "--steps rounds of the main stage (default 12)",
        "--rate learning rate of the regression (default 0.05)",
        "--start.ridge the ridge at the start (default 0.1)",
        "--start.dropout float (default 0.2)",
        "--hypergradient how to differentiate through the fit (default neumann)",
    ):
        assert line in text
    assert "--log-every" not in text


def test_help_all_shows_every_option(mlo):
    code, out, _ = mlo("run", "ridge", "--help-all")
    assert code == 0
    assert "Trained on the validation loss of what it regularizes." in out
    text = squeezed(out)
    for line in (
        "--log-every rounds between two lines of metrics.jsonl",
        f"--hypergradient how to differentiate through the fit ({' | '.join(registry.entries(registry.ESTIMATORS))};"
        " default neumann)",
        "--hypergradient neumann: ",
        "(int; default 2)",  # of this job, where Neumann has another
        "--hypergradient.iterations",
    ):
        assert line in text
    assert text.count("--hypergradient.product.radius") == 2  # of central and of one_sided, once each


@pytest.mark.parametrize("name", ["lbt", "evaluate"])
@pytest.mark.parametrize("command", ["run", "sweep", "graph"])
def test_help_of_our_jobs_is_one_screen(mlo, command, name):
    _, out, err = mlo(command, name, "--help")
    assert err == ""
    lines = out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    if command == "run":
        assert sum(f"  mlo run {name}" in line for line in lines) == 3
    mains = [option for options in load_job(name).main_options.values() for option in options]
    assert 8 <= len(mains) <= 14
    assert all(f"--{option.replace('_', '-')}" in out for option in mains)


def test_completion_of_commands_and_names(completed):
    assert {"run", "resume", "sweep", "reproduce", "list"} <= set(completed("mlo "))
    assert completed("mlo re") == ["resume", "reproduce"]
    assert completed("mlo run li") == ["light"]
    assert completed("mlo graph li") == ["light"]
    assert {"table2", "table3"} <= set(completed("mlo reproduce tab"))


def test_completion_of_options_and_their_values(completed):
    assert completed("mlo run light --start.") == ["--start.ridge", "--start.dropout"]
    assert set(completed("mlo run light --mode off --")) >= {"--hypergradient", "--log-every", "--output", "--help"}
    assert completed("mlo run light --hypergradient nys") == ["nystrom"]
    assert completed("mlo run light --mode ") == ["on", "off"]
    assert completed("mlo run light --fast t") == ["true"]
    assert completed("mlo run light --mode off st") == []
    assert completed("mlo sweep light --grid.mo") == ["--grid.mode"]
    assert completed("mlo sweep light --mo") == ["--mode"]
    assert completed("mlo run light --grid.mo") == []
    assert completed("mlo run nothing --") == completed("mlo run --")


def test_completion_below_a_choice_has_the_options_of_all_classes(completed):
    assert completed("mlo sweep light --grid.hypergradient.te") == ["--grid.hypergradient.terms"]
    assert completed("mlo run light --hypergradient.product.r") == ["--hypergradient.product.radius"]


@pytest.mark.parametrize("line", ["mlo run l", "mlo run lbt --methods '[lbt]' --search.", "mlo sweep light --grid."])
def test_completion_imports_no_torch(light, line):
    out, err = in_a_process(light, **completion(line))
    assert out
    assert err == "imported: nothing\n"


def test_the_script_for_a_shell_is_shown(light):
    out, _ = in_a_process(light, "--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "_MLO_COMPLETE=complete_bash" in out
    assert not Path(light, ".bashrc").exists()
