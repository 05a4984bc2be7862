"""The workloads with mlo and `compile=True`."""

from __future__ import annotations

from benchmarks.peers.libraries import Runner, with_mlo
from benchmarks.peers.workloads import Task


def build(task: Task, estimator: str) -> Runner:
    """See :mod:`benchmarks.peers.libraries`."""
    return with_mlo.build(task, estimator, compiled=True)
