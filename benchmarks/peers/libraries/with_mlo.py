"""The workloads with this engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import mlo
from benchmarks.peers.catalogue import ITERATIONS
from benchmarks.peers.libraries import Runner
from benchmarks.peers.workloads import RADIUS, Bilevel, Task, Teaching

OPTIONS: dict[str, Any] = {
    "one_step": "one_step",
    "darts": {"kind": "darts", "radius": RADIUS},
    "unrolled": "unrolled",
    "recomputed": "unrolled",  # the same; compared with the loop that does the same
    "cg": {"kind": "cg", "iterations": ITERATIONS, "tolerance": 0.0},
    "neumann": {"kind": "neumann", "terms": ITERATIONS},
}


class _Model(mlo.Problem):
    def __init__(self, task: Bilevel, **problem: Any) -> None:
        super().__init__("model", module=task.model, **problem)
        self._task = task

    def loss(self, batch: Any, weights: mlo.Problem) -> Tensor:
        return self._task.lower_loss(self, weights, self.params.values(), batch)


class _Weights(mlo.Problem):
    def __init__(self, task: Bilevel, **problem: Any) -> None:
        super().__init__("weights", module=task.weights, **problem)
        self._task = task

    def loss(self, batch: Any, model: mlo.Problem) -> Tensor:
        return self._task.upper_loss(model, batch)


class _Teacher(mlo.Problem):
    def __init__(self, task: Teaching, **problem: Any) -> None:
        super().__init__("teacher", module=task.teacher, **problem)
        self._task = task

    def loss(self, batch: Any, arch: mlo.Problem) -> Tensor:
        return self._task.teacher_loss(self, arch(), batch)


class _Student(mlo.Problem):
    def __init__(self, task: Teaching, **problem: Any) -> None:
        super().__init__("student", module=task.student, **problem)
        self._task = task

    def loss(self, batch: Any, teacher: mlo.Problem, arch: mlo.Problem) -> Tensor:
        unlabeled = batch["unlabeled"]
        pseudo = teacher(unlabeled, arch()).softmax(1)
        return self._task.student_loss(self, pseudo, batch["labeled"], unlabeled)


class _Arch(mlo.Problem):
    def __init__(self, task: Teaching, **problem: Any) -> None:
        super().__init__("arch", module=task.arch, **problem)
        self._task = task

    def loss(self, batch: Any, teacher: mlo.Problem, student: mlo.Problem) -> Tensor:
        return self._task.arch_loss(teacher, self(), student, batch)


class _Run:
    def __init__(self, engine: mlo.Engine, top: str, trains: bool) -> None:
        self._engine, self._top = engine, top
        self.round = engine.step if trains else self.gradient

    def gradient(self) -> list[Tensor]:
        return list(self._engine.hypergradient(self._top).values())


def build(task: Task, estimator: str) -> Runner:
    """See :mod:`benchmarks.peers.libraries`. Lookahead is off: the peers have none."""
    problems, top = _teaching(task) if isinstance(task, Teaching) else _bilevel(task)
    return _Run(mlo.Engine(problems, OPTIONS[estimator], lookahead=False, device="cpu"), top, task.trains)


def _bilevel(task: Bilevel) -> tuple[list[mlo.Problem], str]:
    sgd = torch.optim.SGD(task.model.parameters(), lr=task.lr, momentum=task.momentum)
    adam = torch.optim.Adam(task.weights.parameters(), lr=task.upper_lr)
    model = _Model(task, optimizer=sgd, data=task.lower, steps=task.steps)
    return [model, _Weights(task, optimizer=adam, data=task.upper)], "weights"


def _teaching(task: Teaching) -> tuple[list[mlo.Problem], str]:
    def sgd(module: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=task.lr, momentum=task.momentum)

    data = {"labeled": task.labeled, "unlabeled": task.unlabeled}
    adam = torch.optim.Adam(task.arch.parameters(), lr=task.upper_lr)
    teacher = _Teacher(task, optimizer=sgd(task.teacher), data=task.teacher_data)
    student = _Student(task, optimizer=sgd(task.student), data=data)
    return [teacher, student, _Arch(task, optimizer=adam, data=task.validation)], "arch"
