"""Trials in processes that are forked from a warm one, and what came of them."""

from __future__ import annotations

import importlib
import itertools
import json
import mmap
import os
import signal
import struct
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

FAILED = "failed"
PRELOADED = ("torch._dynamo", "matplotlib.figure", "sklearn.datasets", "scipy.stats")
PRELOADED += ("mlo.cli.main", "mlo.reports.tables", "mlo.sweeps.experiment")
PRELOADED += ("problems.jobs.evaluate", "problems.jobs.lbt_stages", "problems.jobs.report", "problems.paper.tables")
DETAIL = 2000  # characters; a line is then written to a pipe at once


class Outcome(NamedTuple):
    """What came of one attack.

    Attributes:
        number: of the trial.
        what: what was attacked.
        verdict: what came of it; ``FAILED`` if a promise was broken.
        detail: if it failed, how.
    """

    number: int
    what: str
    verdict: str
    detail: str = ""


Trial = Callable[[int], list[Outcome]]


def preload() -> None:
    """Import what the commands need, before any fork."""
    for name in PRELOADED:
        importlib.import_module(name)
    torch.set_num_threads(1)


def refuse_threads() -> None:
    """Raise a RuntimeError if this process has several threads, of which a fork copies only one."""
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("this process has several threads; set OMP_NUM_THREADS=1")


class Counter:
    """A number that processes share."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 8)

    @property
    def value(self) -> int:
        """The number."""
        return int(struct.unpack("q", self._shared[:])[0])

    @value.setter
    def value(self, value: int) -> None:
        self._shared[:] = struct.pack("q", value)


def run_trials(trial: Trial, goal: int, workers: int, first: int = 0) -> Iterator[Outcome]:
    """Outcomes of the trials ``first``, ``first + 1``, ..., until there are at least ``goal``."""
    done, (read, write) = Counter(), os.pipe()
    pids = []
    for worker in range(workers):
        pids.append(os.fork())
        if not pids[-1]:
            os.close(read)
            _work(trial, itertools.count(first + worker, workers), done, goal, write)
    os.close(write)
    with os.fdopen(read) as lines:
        for line in lines:
            yield Outcome(*json.loads(line))
    for pid in pids:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code:
            how = signal.strsignal(-code) if code < 0 else f"exit code {code}"
            yield Outcome(-1, "trials", FAILED, f"the process that does them ended: {how}")


def _work(trial: Trial, numbers: Iterator[int], done: Counter, goal: int, write: int) -> None:
    code = 1
    try:
        for number in numbers:
            if done.value >= goal:
                break
            outcomes = _tried(trial, number)
            done.value += len(outcomes)
            for outcome in outcomes:
                line = json.dumps(outcome._replace(detail=outcome.detail[-DETAIL:])) + "\n"
                os.write(write, line.encode())
        code = 0
    finally:
        os._exit(code)


def _tried(trial: Trial, number: int) -> list[Outcome]:
    try:
        return trial(number)
    except Exception:  # noqa: BLE001  # one that the trial did not expect
        return [Outcome(number, "trials", FAILED, traceback.format_exc())]
