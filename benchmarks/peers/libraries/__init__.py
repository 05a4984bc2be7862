"""One module for each library, with a function ``build(task, estimator)`` that returns a :class:`Runner`."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

from torch import Tensor

from benchmarks.peers.workloads import Task


class Runner(Protocol):
    """Runs a workload with a library."""

    def gradient(self) -> list[Tensor]:
        """Return the first hypergradient. Called once, before anything else."""

    def round(self) -> None:
        """Run one round, which is timed."""


def build(library: str, task: Task, estimator: str) -> Runner:
    """Import ``library`` and build the runner of a workload."""
    return import_module(f"{__name__}.with_{library}").build(task, estimator)
