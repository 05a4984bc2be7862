"""Commands that run side by side as processes of this machine. One that fails or dies does not stop the others."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mlo.errors import ConfigError, MloError

Item = TypeVar("Item")
POLL_SECONDS = 0.05
STOPPED = 130


@dataclass(frozen=True)
class Command:
    """A command to run as `python -m MODULE ...`.

    Attributes:
        words: the module and its arguments.
        log: the file that the command's output is appended to.
    """

    words: Sequence[str]
    log: Path


@dataclass(frozen=True)
class Failure:
    """Why a command did not finish.

    Attributes:
        message: the error that it ended with.
        refused: whether it ended with exit code 2, as `mlo` does if an option is wrong.
    """

    message: str
    refused: bool = False


def run_processes(
    items: Sequence[Item], command: Callable[[Item], Command], workers: int = 1, one_core_each: bool = False
) -> Generator[tuple[Item, Failure | None], None, None]:
    """Run a command for each item; yields (item, None, or why it failed) in the order in which they end.

    SIGINT (Ctrl-C) and SIGTERM are passed on to the processes once, as a SIGTERM: `mlo run` then writes a checkpoint
    and exits. A second signal kills them. If this process itself is killed, the processes that are running finish their
    commands, and no further ones are started.

    Each process has a session of its own, so the terminal's Ctrl-C reaches only this process. On Windows there are no
    sessions, and the console passes Ctrl-C to all.

    Args:
        items: what to do, in this order.
        command: returns the command of an item, right before it starts; an MloError that it raises is the item's
            failure.
        workers: how many processes run at the same time.
        one_core_each: pin each process to a different CPU core, with one thread.

    Raises:
        ConfigError: if there are fewer cores than workers.
        KeyboardInterrupt: after all processes have ended, if a SIGINT or SIGTERM came.
    """
    free: list[int | None] = available_cores(workers) if one_core_each else [None] * workers
    waiting = deque(items)
    running: dict[_Process, Item] = {}
    try:
        with _signals_passed_on(running) as stopping:
            while running or (waiting and not stopping()):
                while free and waiting and not stopping():
                    item = waiting.popleft()
                    try:
                        process = _Process(command(item), free[-1])
                    except MloError as error:
                        yield item, Failure(str(error))
                        continue
                    free.pop()
                    running[process] = item
                    if stopping():  # the signal came before this process was among those that it is passed on to
                        process.stop()
                time.sleep(POLL_SECONDS)
                for process in [process for process in running if process.ended()]:
                    item = running.pop(process)
                    free.append(process.core)
                    failure = process.failure()
                    if not (failure and stopping()):
                        yield item, failure
            if stopping():
                raise KeyboardInterrupt
    finally:
        for process in running:
            process.kill()
            process.wait()


def available_cores(workers: int) -> list[int | None]:
    """A CPU core for each worker.

    Raises:
        ConfigError: if there are too few, or the system cannot pin a process to a core.
    """
    if not hasattr(os, "sched_getaffinity"):
        raise ConfigError("one core each: this system cannot pin a process to a core; leave out the option")
    cores = sorted(os.sched_getaffinity(0))
    if workers > len(cores):
        raise ConfigError(f"one core each: {workers} workers, but {len(cores)} cores; give fewer workers")
    return [*cores[:workers]]


class _Process:
    """A running command."""

    def __init__(self, command: Command, core: int | None) -> None:
        self.core = core
        self._log = command.log
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # so that output and errors are in the log in their order
        if core is not None:
            environment["OMP_NUM_THREADS"] = "1"
        with command.log.open("ab") as log:
            self._output_start = log.tell()
            self._process = subprocess.Popen(
                # -P: modules in the current folder must not replace those of installed packages
                [sys.executable, "-P", "-m", *command.words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        if core is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.sched_setaffinity(self._process.pid, {core})

    def stop(self) -> None:
        """Ask the process to stop."""
        if os.name == "posix":  # on Windows this would kill it, and the console has passed Ctrl-C on already
            self._process.terminate()

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()

    def wait(self) -> None:
        """Wait until the process has ended."""
        self._process.wait()

    def ended(self) -> bool:
        return self._process.poll() is not None

    def failure(self) -> Failure | None:
        code = self._process.returncode
        if code == 0:
            return None
        if code == STOPPED:
            return Failure("stopped by a signal from outside")
        if code < 0:
            return Failure(f"killed by signal {-code} ({signal.strsignal(-code)})")
        with self._log.open("rb") as log:
            log.seek(self._output_start)
            output = log.read().decode(errors="replace")
        return Failure(error_message(output) or f"exit code {code}", refused=code == 2)


def error_message(output: str) -> str:
    """The error at the end of a command's output: the text after the last `error:` or traceback; empty if none."""
    _, *errors = re.split(r"^error: |^Traceback .*\n(?: .*\n)*", output, flags=re.MULTILINE)
    return errors[-1].strip() if errors else ""


@contextmanager
def _signals_passed_on(running: Collection[_Process]) -> Iterator[Callable[[], bool]]:
    """Pass SIGINT and SIGTERM on to the running processes; yields a function that returns whether one came."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        for process in list(running):
            if len(received) == 1:
                process.stop()
            else:
                process.kill()

    if threading.current_thread() is not threading.main_thread():  # where Python handles no signals
        yield lambda: False
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
