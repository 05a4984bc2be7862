"""Commands that run side by side as processes of this machine. One that fails or dies does not stop the others."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple, TypeVar

from mlo.errors import ConfigError, MloError
from mlo.runs.signals import handle_stop_signals

Item = TypeVar("Item")
Command = tuple[Sequence[str], Path]  # the words after `python -m`, and the file that the output is appended to
_Process = subprocess.Popen[bytes]
STOPPED = 130


class Failure(NamedTuple):
    """Why a command did not finish.

    Attributes:
        message: the error that it ended with.
        refused: whether it ended with exit code 2, as `mlo` does if an option is wrong.
    """

    message: str
    refused: bool = False


def run_processes(
    items: Sequence[Item],
    command: Callable[[Item], Command],
    ended: Callable[[Item, Failure | None], None],
    workers: int = 1,
    one_core_each: bool = False,
) -> None:
    """Run a command for each item.

    SIGINT (Ctrl-C) and SIGTERM are passed on to the processes once, as a SIGTERM: `mlo run` then writes a checkpoint
    and exits. A second signal kills them. If this process itself is killed, the processes that are running finish their
    commands, and no further ones are started.

    Each process has a session of its own, so the terminal's Ctrl-C reaches only this process. On Windows there are no
    sessions, and the console passes Ctrl-C to all.

    Args:
        items: what to do, in this order.
        command: returns the command of an item. It is called in a thread, right before the command starts. If it raises
            an MloError, that is the item's failure.
        ended: called with each item whose command has ended, and None or why it failed. If it raises, the processes
            that are running are killed.
        workers: how many processes run at the same time.
        one_core_each: pin each process to a different CPU core, with one thread.

    Raises:
        ConfigError: if there are fewer cores than workers.
        KeyboardInterrupt: after all processes have ended, if a SIGINT or SIGTERM came.
    """
    cores = available_cores(workers) if one_core_each else []
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # so that output and errors are in the log in their order
    if one_core_each:
        environment["OMP_NUM_THREADS"] = "1"
    running = _Running(environment)

    def pin() -> None:
        if cores:
            os.sched_setaffinity(0, {cores.pop()})  # of this thread, and of the processes that it starts

    def run(item: Item) -> Failure | None:
        try:
            return running.run(*command(item))
        except MloError as error:
            return Failure(str(error))

    with handle_stop_signals(), ThreadPoolExecutor(workers, initializer=pin) as pool:
        try:
            futures = {pool.submit(run, item): item for item in items}
            for future in as_completed(futures):
                ended(futures[future], future.result())
        except KeyboardInterrupt:
            running.stop(_terminate)
            pool.shutdown(cancel_futures=True)  # waits for the processes; a second signal ends the wait
            raise
        finally:
            running.stop(_Process.kill)
            pool.shutdown(cancel_futures=True)


class _Running:
    """The running processes. Threads start them and wait for them; the main thread may stop them."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._processes: set[_Process] = set()
        self._stop: Callable[[_Process], None] | None = None

    def run(self, words: Sequence[str], log: Path) -> Failure | None:
        """Run a command to its end."""
        with log.open("ab") as output:
            start = output.tell()
            process = subprocess.Popen(
                # -P: modules in the current folder must not replace those of installed packages
                [sys.executable, "-P", "-m", *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        self._processes.add(process)
        if self._stop:  # it was called before this process was there
            self._stop(process)
        code = process.wait()
        self._processes.discard(process)
        return _failure(code, log.read_bytes()[start:].decode(errors="replace"))

    def stop(self, how: Callable[[_Process], None]) -> None:
        """Stop all processes, and those that a thread is just starting."""
        self._stop = how
        for process in [*self._processes]:
            how(process)


def _terminate(process: _Process) -> None:
    if os.name == "posix":  # on Windows this would kill it, and the console has passed Ctrl-C on already
        process.terminate()


def available_cores(workers: int) -> list[int]:
    """A CPU core for each worker.

    Raises:
        ConfigError: if there are too few, or the system cannot pin a process to a core.
    """
    if not hasattr(os, "sched_getaffinity"):
        raise ConfigError("one core each: this system cannot pin a process to a core; leave out the option")
    cores = sorted(os.sched_getaffinity(0))
    if workers > len(cores):
        raise ConfigError(f"one core each: {workers} workers, but {len(cores)} cores; give fewer workers")
    return cores[:workers]


def _failure(code: int, output: str) -> Failure | None:
    if code == 0:
        return None
    if code == STOPPED:
        return Failure("stopped by a signal from outside")
    if code < 0:
        return Failure(f"killed by signal {-code} ({signal.strsignal(-code)})")
    return Failure(error_message(output) or f"exit code {code}", refused=code == 2)


def error_message(output: str) -> str:
    """The error at the end of a command's output: the text after the last `error:` or traceback; empty if none."""
    _, *errors = re.split(r"^error: |^Traceback .*\n(?: .*\n)*", output, flags=re.MULTILINE)
    return errors[-1].strip() if errors else ""
