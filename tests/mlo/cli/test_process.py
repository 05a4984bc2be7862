"""The command as a process: stopped while it starts, and the command that continues it."""

import os
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

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
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # a shell that starts the tests in the background has told them to ignore the interrupt
    interruptible = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True, preexec_fn=interruptible, **pipes)


def test_ctrl_c_while_a_job_is_imported_ends_with_one_line(register, tmp_path):
    site = register("waiting", WAITING, {"mlo.problems": {"waiting": "waiting:Job"}})
    process = start("run", "waiting", cwd=tmp_path, path=[site])
    while not Path(tmp_path, "importing").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "stopped\n")
    assert process.returncode == 130


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
