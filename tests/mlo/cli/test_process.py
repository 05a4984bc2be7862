"""The command as a process: stopped while it starts, and beside modules that have the names of our packages."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlo.ops import distributed

WAITING = """
import time
from pathlib import Path

Path("importing").touch()
time.sleep(60)
"""


def start(*words, cwd, path=()):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-m", "mlo", *words]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_ctrl_c_while_a_job_is_imported_ends_with_one_line(register, tmp_path):
    site = register("waiting", WAITING, {"mlo.problems": {"waiting": "waiting:Job"}})
    process = start("run", "waiting", cwd=tmp_path, path=[site])
    while not Path(tmp_path, "importing").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "stopped\n")
    assert process.returncode == 130


@pytest.mark.parametrize("name", ["problems.py", "problems/__init__.py"])
def test_files_in_the_current_folder_do_not_hide_our_packages(tmp_path, name):
    Path(tmp_path, name).parent.mkdir(exist_ok=True)
    Path(tmp_path, name).write_text("raise SystemExit('executed')")
    out, err = start("run", "evaluate", "--help", cwd=tmp_path).communicate(timeout=60)
    assert err == ""
    assert out.startswith("Usage: mlo run evaluate")


@pytest.mark.parametrize("name", ["problems.py", "problems/__init__.py"])
def test_a_module_that_hides_ours_is_an_error_that_names_both(tmp_path, name):
    Path(tmp_path, name).parent.mkdir(exist_ok=True)
    Path(tmp_path, name).write_text("raise SystemExit('executed')")
    process = start("run", "evaluate", cwd=tmp_path, path=[tmp_path])
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    (line,) = err.splitlines()
    theirs = tmp_path / name.removesuffix("/__init__.py")
    assert line.startswith(f"error: {theirs} hides the package 'problems' of mlo-torch, which is in ")
    assert line.endswith(f"; rename yours, or remove {tmp_path} from PYTHONPATH")


def test_the_command_that_continues_is_written_as_a_shell_finds_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("my bin", "other"):
        Path(folder).mkdir()
        Path(folder, "mlo").touch(mode=0o755)
    here, path = str(tmp_path / "my bin" / "mlo"), os.environ["PATH"]
    monkeypatch.setattr(sys, "argv", ["my bin/mlo"])
    monkeypatch.setenv("PATH", f"{tmp_path / 'my bin'}{os.pathsep}{path}")
    assert distributed.launcher() == "mlo"
    for others in (path, f"{tmp_path / 'other'}{os.pathsep}{path}"):
        monkeypatch.setenv("PATH", others)
        assert distributed.launcher() == "'my bin/mlo'"
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir(tmp_path / "other")
            elsewhere.setattr(sys, "argv", [here])
            assert distributed.launcher() == shlex.quote(here)


def test_the_command_of_python_m_mlo_names_the_python(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/mlo/__main__.py", "run"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "")
    assert distributed.launcher() == f"{tmp_path / 'python'} -m mlo"
    Path(tmp_path, "python").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert distributed.launcher() == "python -m mlo"
