"""The workloads with mlo."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import mlo
from benchmarks.peers.catalogue import ITERATIONS, LANGUAGE_ITERATIONS
from benchmarks.peers.libraries import Runner
from benchmarks.peers.workloads import RADIUS, Bilevel, Language, Task, Teaching
from mlo.hypergradient import Exact

OPTIONS: dict[str, Any] = {
    "one_step": "one_step",
    "darts": {"kind": "darts", "radius": RADIUS},
    "sama": {"kind": "sama", "radius": RADIUS},
    "unrolled": "unrolled",
    "kept": {"kind": "unrolled", "graph_memory": 4096},
    "recomputed": {"kind": "unrolled", "graph_memory": 0},
    "product": "one_step",
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
    def __init__(self, task: Bilevel | Language, **problem: Any) -> None:
        super().__init__("weights", module=task.weights, **problem)
        self._task = task

    def loss(self, batch: Any, model: mlo.Problem) -> Tensor:
        return self._task.upper_loss(model, batch)


class _Reader(mlo.Problem):
    def __init__(self, task: Language, **problem: Any) -> None:
        super().__init__("model", module=task.model, **problem)
        self._task = task

    def loss(self, batch: Any, weights: mlo.Problem) -> Tensor:
        return self._task.lower_loss(self, weights, batch)


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


class _Product:
    """One exact product at the start of the first step, through the interface that estimators use."""

    def __init__(self, problems: list[mlo.Problem], task: Bilevel, compiled: bool) -> None:
        problems[0].steps = 1
        engine = mlo.Engine(problems, "one_step", lookahead=False, compile=compiled, device="cpu")
        states = {problem.name: problem.live_state() for problem in problems}
        self._task = task
        (self._step,) = engine._rounds.below("weights", list(states), states)[1]["model"]
        self._step.forget()  # as if it were an earlier step

    def gradient(self) -> list[Tensor]:
        curvature = Exact().before(self._step, ("weights",))
        own, cross = curvature(self._task.direction(self._step.point.state.variables))
        return [*own, *(cross["weights"] or ())]

    def round(self) -> None:
        self.gradient()


def build(task: Task, estimator: str, compiled: bool = False) -> Runner:
    """See :mod:`benchmarks.peers.libraries`. Lookahead is off, since the other libraries do not have it."""
    options = OPTIONS[estimator]
    if estimator == "neumann":
        options = options | {"rate": task.lr}
    if isinstance(task, Language):
        problems, top = _language(task)
        if estimator == "cg":
            options = options | {"iterations": LANGUAGE_ITERATIONS, "damping": task.damping}
    else:
        problems, top = _teaching(task) if isinstance(task, Teaching) else _bilevel(task)
    engine = mlo.Engine(problems, options, lookahead=False, compile=compiled, device="cpu")
    if estimator == "product" and isinstance(task, Bilevel):
        return _Product(problems, task, compiled)
    return _Run(engine, top, task.trains)


def _bilevel(task: Bilevel) -> tuple[list[mlo.Problem], str]:
    sgd = torch.optim.SGD(task.model.parameters(), lr=task.lr, momentum=task.momentum)
    adam = torch.optim.Adam(task.weights.parameters(), lr=task.upper_lr)
    model = _Model(task, optimizer=sgd, data=task.lower, steps=task.steps)
    return [model, _Weights(task, optimizer=adam, data=task.upper)], "weights"


def _language(task: Language) -> tuple[list[mlo.Problem], str]:
    adam = torch.optim.Adam(task.weights.parameters(), lr=task.upper_lr)
    model = _Reader(task, optimizer=task.optimizer(), data=task.lower, steps=task.steps)
    return [model, _Weights(task, optimizer=adam, data=task.upper)], "weights"


def _teaching(task: Teaching) -> tuple[list[mlo.Problem], str]:
    def sgd(module: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=task.lr, momentum=task.momentum)

    data = {"labeled": task.labeled, "unlabeled": task.unlabeled}
    adam = torch.optim.Adam(task.arch.parameters(), lr=task.upper_lr)
    teacher = _Teacher(task, optimizer=sgd(task.teacher), data=task.teacher_data)
    student = _Student(task, optimizer=sgd(task.student), data=data)
    return [teacher, student, _Arch(task, optimizer=adam, data=task.validation)], "arch"
