"""One module for each library; each has ``build(task, estimator)``, an object with ``gradient()`` and ``round()``.

``gradient()``, called first and once, returns the first hypergradient; ``round()`` is what is timed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

from torch import Tensor

from benchmarks.peers.workloads import Task


class Runner(Protocol):
    """A workload in the hands of a library."""

    def gradient(self) -> list[Tensor]:
        """The first hypergradient; to be called before anything else."""

    def round(self) -> None:
        """What is timed."""


def build(library: str, task: Task, estimator: str) -> Runner:
    """The workload in the hands of ``library``, which is imported for it."""
    return import_module(f"{__name__}.with_{library}").build(task, estimator)
