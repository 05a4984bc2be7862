"""The workloads with mlo."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import mlo
from benchmarks.peers.catalogue import ITERATIONS
from benchmarks.peers.libraries import Runner
from benchmarks.peers.workloads import RADIUS, Bilevel, Task, Teaching
from mlo.hypergradient import Exact, Step
from mlo.ops.compiler import Compiler
from mlo.steps.evaluation import Evaluator
from mlo.training.gradients import Gradients
from mlo.training.plan import Plan
from mlo.training.virtual_steps import Rollout

OPTIONS: dict[str, Any] = {
    "one_step": "one_step",
    "darts": {"kind": "darts", "radius": RADIUS},
    "unrolled": "unrolled",
    "kept": {"kind": "unrolled", "graph_memory": 1024},
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


class _Product:
    """One exact product at the start of the first step, through the interface that estimators use."""

    def __init__(self, problems: list[mlo.Problem], task: Bilevel, compiled: bool) -> None:
        cpu, plan = torch.device("cpu"), Plan(problems, "one_step", False, False)
        named = {problem.name: problem for problem in problems}
        named["model"].steps = 1
        self._task, self._evaluator = task, Evaluator(named, cpu, Compiler(cpu) if compiled else None)
        rollout = Rollout(plan, self._evaluator, Gradients(plan, self._evaluator))
        states = {name: problem.live_state() for name, problem in named.items()}
        self._record = rollout.below("weights", list(named), states)[1]["model"][0]
        self._record.graph = self._record.read_cache = None  # as if it were of an earlier step

    def gradient(self) -> list[Tensor]:
        loss = Step(self._record, ("weights",), self._evaluator).before()
        own, cross = Exact().at(loss).both(self._task.direction(loss.point))
        return [*own, *(cross["weights"] or ())]

    def round(self) -> None:
        self.gradient()


def build(task: Task, estimator: str, compiled: bool = False) -> Runner:
    """See :mod:`benchmarks.peers.libraries`. Lookahead is off, since the other libraries do not have it."""
    problems, top = _teaching(task) if isinstance(task, Teaching) else _bilevel(task)
    engine = mlo.Engine(problems, OPTIONS[estimator], lookahead=False, compile=compiled, device="cpu")
    if estimator == "product" and isinstance(task, Bilevel):
        return _Product(problems, task, compiled)
    return _Run(engine, top, task.trains)


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
