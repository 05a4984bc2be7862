"""What is imported when: the core needs torch, numpy and pydantic alone, and the command line starts without torch."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from command_process import CommandProcess

import mlo
from mlo.missing_packages import DISTRIBUTION, INSTALLED_AS, explain_missing

FROM_CLI = ("filelock", "matplotlib", "rich", "scipy", "tabulate", "typer", "yaml")
FROM_EXTRAS = (*FROM_CLI, "jinja2", "sklearn", "torchvision")
HEAVY = ("torch", "torchvision", "numpy", "scipy", "sklearn", "matplotlib")
BILEVEL = """
import torch
import mlo

class Weight(mlo.Problem):
    def loss(self, batch, decay):
        return (self(batch) - 1).square().mean() + decay() * self.params["weight"].square().sum()

class Decay(mlo.Problem):
    def loss(self, batch, weight):
        return (weight(batch) - 1).square().mean()

class Positive(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.value = torch.nn.Parameter(torch.zeros(()))

    def forward(self):
        return self.value.exp()

def problem(kind, name, module):
    return kind(name, module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), data=[torch.ones(2, 3)])

linear = torch.nn.Linear(3, 1, bias=False)
engine = mlo.Engine([problem(Weight, "weight", linear), problem(Decay, "decay", Positive())], "darts", device="cpu")
engine.run(2)
print(mlo.diagnose(engine, estimators=["one_step", "cg"]))
mlo.check(mlo.Engine([*engine.problems.values()], "unrolled", device="cpu"))
"""
REPORT = "import atexit, json, sys\natexit.register(lambda: print('\\n' + json.dumps(sorted(sys.modules))))\n"
HIDE = "import sys\nsys.modules.update(dict.fromkeys({hidden!r}))\n"  # importing any of these is a ModuleNotFoundError
ASKED = (
    REPORT.replace("sorted(sys.modules)", "{{**dict.fromkeys(sys.modules, []), **asked}}")
    + """
asked = {{}}

class Hidden:
    def find_spec(name, path=None, target=None):
        if name in {hidden!r}:
            frame = sys._getframe(1)
            only_searched = False
            while "importlib" in frame.f_code.co_filename:
                only_searched |= "importlib.util" in frame.f_code.co_filename  # find_spec, which imports nothing
                frame = frame.f_back
            asked.setdefault(name, []).append(frame.f_globals["__name__"])
            if only_searched:
                return None
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden)
"""
)
COMMAND = "import sys\nsys.argv = {words!r}\nfrom mlo.__main__ import main\nmain()\n"


def python(program: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, timeout=120, **options)


def imported(program: str) -> set[str]:
    """The modules that are there when the program ends, without error."""
    done = python(REPORT + program)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def command(*words: str) -> str:
    return COMMAND.format(words=["mlo", *words])


def test_importing_mlo_imports_nothing_else():
    assert not {name for name in imported("import mlo") if name.startswith("mlo.")} - {"mlo.lazy"}
    assert not imported("import mlo") & {"torch", "pydantic", "numpy"}


@pytest.fixture(scope="module")
def bilevel() -> dict[str, list[str]]:
    """Of a bilevel run where no package of an extra is found: {module: those that asked for it or imported it}."""
    done = python(ASKED.format(hidden=FROM_EXTRAS) + BILEVEL)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_core_needs_torch_numpy_and_pydantic_alone(bilevel):
    assert {"torch", "numpy", "pydantic"} <= bilevel.keys()
    assert not bilevel.keys() & set(FROM_EXTRAS) - {name for name, askers in bilevel.items() if askers}


def test_a_bilevel_run_asks_for_no_package_of_an_extra(bilevel):
    askers = {asker for name in FROM_EXTRAS for asker in bilevel.get(name, [])}
    assert askers  # torch imports some of them where they are there
    assert not {asker for asker in askers if asker.partition(".")[0] in ("mlo", "problems", "__main__")}


@pytest.mark.parametrize("words", ["--help", "list", "run --help", "run lbt --help", "run evaluate --help"])
def test_the_command_line_starts_without_heavy_packages(words):
    assert not imported(command(*words.split())) & set(HEAVY)


@pytest.mark.parametrize("job", ["lbt:LbtJob", "evaluate:EvaluateJob"])
def test_the_options_of_a_job_and_their_defaults_are_known_without_heavy_packages(job):
    module, _, name = job.partition(":")
    program = f"from problems.jobs.{module} import {name} as Job\nfrom mlo.options.config import defaults\n"
    assert not imported(program + "assert defaults(Job)['data']['source'] == 'digits'") & set(HEAVY)


@pytest.mark.parametrize("package", ["mlo", "problems.nas"])
def test_lazy_names_are_those_that_type_checkers_see(package):
    module = importlib.import_module(package)
    tree = ast.parse(Path(module.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {name.name: node.module for node in block.body for name in node.names}
    assert sorted(seen) == sorted(module.__all__)
    for name, home in seen.items():
        found = getattr(module, name)
        assert name in dir(module)
        if not hasattr(found, "__spec__"):
            assert found is getattr(importlib.import_module(home), name)
        else:
            assert found is importlib.import_module(f"{home}.{name}")
    (table,) = (node.args[1] for node in ast.walk(block) if isinstance(node, ast.Call))
    assert {name: home for home, names in ast.literal_eval(table).items() for name in names.split()} == seen


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'mlo' has no attribute 'Enginee'"):
        mlo.Enginee  # noqa: B018


@pytest.mark.parametrize(
    ("words", "hidden", "said"),
    [
        ("--help", "typer", "`mlo` needs typer, EXTRA[cli]'"),
        ("list", "yaml", "`mlo list` needs pyyaml, EXTRA[cli]'"),
        ("run lbt", "sklearn", "`mlo run lbt` needs scikit-learn, EXTRA[lbt]'"),
        ("run lbt", "torchvision", "`mlo run lbt` needs torchvision, EXTRA[lbt]'"),
        ("run lbt --steps 1", "jinja2", "`mlo run lbt` needs jinja2, EXTRA[lbt]'"),
        ("compare x", "scipy", "`mlo compare x` needs scipy, EXTRA[cli]'"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, words, hidden, said):
    folder = tmp_path / "here"
    folder.mkdir()
    process = CommandProcess(*words.split(), folder=folder, logs=tmp_path, hidden=[hidden])
    expected = said.replace("EXTRA", "which is not installed; in your clone of mlo, run: pip install '.")
    assert process.output() == ("", f"error: {expected}\n")
    assert process.code == 1
    assert not list(folder.iterdir())


def test_a_public_name_that_needs_an_extra_names_the_command_that_installs_it():
    done = python(HIDE.format(hidden=["yaml"]) + "import mlo\nmlo.Experiment")
    last = done.stderr.splitlines()[-1]
    expected = "mlo.Experiment needs pyyaml, which is not installed; in your clone of mlo, run: pip install '.[cli]'"
    assert last.endswith(expected)


def test_a_missing_module_of_the_users_keeps_its_traceback():
    assert explain_missing(ModuleNotFoundError("No module named 'mine'", name="mine"), "it") is None


def test_a_part_that_a_package_does_not_have_keeps_its_traceback():
    assert explain_missing(ModuleNotFoundError("No module named 'torch.nope'", name="torch.nope"), "it") is None


def test_a_missing_package_of_the_core_is_named_without_an_extra():
    said = explain_missing(ModuleNotFoundError("No module named 'torch'", name="torch"), "it")
    assert said == "it needs torch, which is not installed; in your clone of mlo, run: pip install ."


def test_all_packages_of_the_extras_are_hidden_here():
    for extra, modules in (("cli", FROM_CLI), ("lbt", FROM_EXTRAS)):
        required = [line for line in requires(DISTRIBUTION) if f"extra == '{extra}'" in line]
        assert {re.split("[<>=]", line)[0] for line in required} == {INSTALLED_AS.get(name, name) for name in modules}


def test_ctrl_c_while_the_command_starts_ends_it_with_one_line():
    program = "import builtins\nreal = builtins.__import__\ndef interrupted(name, *rest):\n"
    program += "    if name == 'typer': raise KeyboardInterrupt\n    return real(name, *rest)\n"
    done = python(program + "builtins.__import__ = interrupted\n" + command("list"))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


def test_a_problems_py_in_the_current_folder_does_not_hide_ours(tmp_path):
    (tmp_path / "problems.py").write_text("raise SystemExit('executed')")
    words = [sys.executable, "-m", "mlo", "run", "evaluate", "--help"]
    done = subprocess.run(words, cwd=tmp_path, text=True, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run(
        words, text=True, capture_output=True, timeout=120, env={**os.environ, "PYTHONPATH": tmp_path}
    )
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: 'evaluate' is registered in mlo.problems as problems.jobs.evaluate:EvaluateJob"
    )
    assert f"{tmp_path / 'problems.py'} hides that package" in done.stderr
