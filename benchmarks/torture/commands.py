"""Commands of mlo by a fork, without a new interpreter; each can be killed before any of its file operations."""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

from benchmarks.torture.workers import Counter
from mlo.cli import main as cli
from mlo.sweeps import cost, processes

LIMIT = 300.0  # seconds, after which a command hangs
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


class Death(NamedTuple):
    """When a command is killed.

    Attributes:
        seconds: after this time; None: before a file operation instead.
        operation: the number of that operation, among those of all processes of the command.
        everything: whether at a time all processes of the command are killed, or only the first.
    """

    seconds: float | None = None
    operation: int = 0
    everything: bool = True


class Ended(NamedTuple):
    """How a command ended: its exit code, whether something of it was killed, file operations, seconds, output."""

    code: int
    killed: bool
    operations: int
    seconds: float
    output: str


class _Trap:
    """Counts the file operations in a folder, and kills the process that is about to do a given one."""

    def __init__(self, folder: Path, fatal: int) -> None:
        self._folder, self._fatal, self.count = str(folder), fatal, Counter()

    def set(self) -> None:
        sys.addaudithook(self._hear)
        fsync = os.fsync  # of which there is no event

        def counted(file: int) -> None:
            self._step()
            fsync(file)

        os.fsync = counted

    def _hear(self, event: str, given: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(given[2], int) and given[2] & WRITES
        if (writes or event in CHANGES) and str(given[0]).startswith(self._folder):
            self._step()

    def _step(self) -> None:
        self.count.value += 1
        if self.count.value == self._fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    @property
    def struck(self) -> bool:
        return 0 < self._fatal <= self.count.value


def run_command(words: Sequence[str], folder: Path, log: Path, death: Death | None = None) -> Ended:
    """Run a command that writes below a folder to its end, and to that of the processes that it starts."""
    death = death or Death()
    trap, (read, write), started = _Trap(folder, death.operation), os.pipe(), time.monotonic()
    pid = os.fork()
    if not pid:
        os.setpgid(0, 0)  # so that all its processes can be killed together
        trap.set()
        with log.open("wb") as output:
            _become(["mlo", *words], output.fileno(), os.environ)
    os.close(write)  # the others of the pipe are closed when the last process has ended
    ended = bool(select.select([read], [], [], LIMIT if death.seconds is None else death.seconds)[0])
    killed = not ended and _kill(pid, death.everything)
    if not ended and not select.select([read], [], [], LIMIT)[0]:
        _kill(pid, True)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(read)
    hung = killed and death.seconds is None
    seconds = time.monotonic() - started
    text = log.read_text(errors="replace") + "\nit hung" * hung
    return Ended(code, (killed or trap.struck) and not hung, trap.count.value, seconds, text)


def _kill(pid: int, everything: bool) -> bool:
    if everything:
        os.killpg(pid, signal.SIGKILL)
    else:
        os.kill(pid, signal.SIGKILL)
    return True


def _become(words: Sequence[str], output: int, environment: Mapping[str, str]) -> NoReturn:
    """Do what `python -m WORDS` does, and end this process."""
    code: Any = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False, buffering=1) for number in (1, 2))
        os.environ.update(environment)
        processes.subprocess = SimpleNamespace(Popen=_Forked, DEVNULL=None, STDOUT=None)
        sys.argv = list(words)
        if words[0] == "mlo":
            cli.main()
        else:
            cost.main(Path(words[1]))
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:  # noqa: BLE001  # as an interpreter does
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code or 0)


def command_here(*words: str) -> tuple[int, str]:
    """Run a command line in this process: (exit code, what it printed); an exception is a traceback and code -1."""
    output = io.StringIO()
    before = sys.argv
    sys.argv = ["mlo", *words]
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            cli.main()
        return 0, output.getvalue()
    except SystemExit as end:
        return (end.code if isinstance(end.code, int) else 1), output.getvalue()
    except BaseException:  # noqa: BLE001  # any other error is what is looked for
        return -1, output.getvalue() + traceback.format_exc()
    finally:
        sys.argv = before


class _Forked:
    """What a sweep needs of subprocess.Popen."""

    def __init__(self, command: Sequence[str], *, stdout: Any, env: Mapping[str, str], **_: Any) -> None:
        self.pid = os.fork()
        if not self.pid:
            _become(command[3:], stdout.fileno(), env)  # without the interpreter, -P and -m

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
