"""The hand-written loops, with the interface of a library."""

from __future__ import annotations

from benchmarks.peers.by_hand import Cleaning, Reweighting
from benchmarks.peers.by_hand_gpt import Training
from benchmarks.peers.by_hand_lbt import Teach
from benchmarks.peers.libraries import Runner
from benchmarks.peers.workloads import Language, Task, Teaching


def build(task: Task, estimator: str) -> Runner:
    """See :mod:`benchmarks.peers.libraries`."""
    if isinstance(task, Teaching):
        return Teach(task, estimator)
    if isinstance(task, Language):
        return Training(task, estimator)
    return (Reweighting if task.trains else Cleaning)(task, estimator)
