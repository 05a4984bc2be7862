"""The workloads with Betty: problems, dependencies, an engine."""

from __future__ import annotations

from typing import Any

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem, IterativeProblem
from torch import Tensor

from benchmarks.peers.catalogue import ITERATIONS
from benchmarks.peers.libraries import Runner
from benchmarks.peers.workloads import RADIUS, Bilevel, Task, Teaching


class _Lower:
    task: Bilevel

    def training_step(self, batch: Any) -> Tensor:
        return self.task.lower_loss(self, self.weights, self.trainable_parameters(), batch)


class _Upper(ImplicitProblem):
    task: Bilevel
    found: list[Tensor] | None = None

    def training_step(self, batch: Any) -> Tensor:
        return self.task.upper_loss(self.model, batch)

    def grad_callback(self) -> None:
        if self.found is None:
            self.found = [p.grad.clone() for p in self.trainable_parameters()]


class _Implicit(_Lower, ImplicitProblem):
    pass


class _Iterative(_Lower, IterativeProblem):
    pass


class _Teacher(ImplicitProblem):
    task: Teaching

    def training_step(self, batch: Any) -> Tensor:
        return self.task.teacher_loss(self, self.arch(), batch)


class _Student(ImplicitProblem):
    task: Teaching

    def training_step(self, batch: Any) -> Tensor:
        labeled, (unlabeled,) = batch
        pseudo = self.teacher(unlabeled, self.arch()).softmax(1)
        return self.task.student_loss(self, pseudo, labeled, unlabeled)


class _Arch(_Upper):
    def training_step(self, batch: Any) -> Tensor:
        return self.task.arch_loss(self.teacher, self(), self.student, batch)


class _Run:
    def __init__(self, engine: Engine, top: _Upper, steps: int) -> None:
        self._engine, self._top, self._steps = engine, top, steps
        engine.train()

    def gradient(self) -> list[Tensor]:
        self.round()
        return self._top.found

    def round(self) -> None:
        for _ in range(self._steps):
            self._engine.global_step += 1
            self._engine.train_step()


def build(task: Task, estimator: str) -> Runner:
    """See :mod:`benchmarks.peers.libraries`.

    A round of hyper-cleaning continues from the last one, since Betty cannot restart.
    """
    if isinstance(task, Teaching):
        problems, u2l, l2u = _teaching(task, estimator)
    else:
        problems, u2l, l2u = _bilevel(task, estimator)
    for problem in problems:
        problem.task = task
    engine = Engine(problems=problems, config=EngineConfig(), dependencies={"u2l": u2l, "l2u": l2u})
    return _Run(engine, problems[-1], getattr(task, "steps", 1))


def _bilevel(task: Bilevel, estimator: str) -> tuple[list[Any], dict[Any, Any], dict[Any, Any]]:
    sgd = torch.optim.SGD(task.model.parameters(), lr=task.lr, momentum=task.momentum)
    adam = torch.optim.Adam(task.weights.parameters(), lr=task.upper_lr if task.trains else 0.0)
    config = Config(
        type="darts" if estimator == "unrolled" else estimator,
        unroll_steps=task.steps,
        darts_alpha=RADIUS,
        cg_iterations=ITERATIONS,
        neumann_iterations=ITERATIONS - 1,
        neumann_alpha=task.lr,
    )
    kind = _Iterative if estimator == "unrolled" else _Implicit
    model = kind("model", config, task.model, sgd, train_data_loader=task.lower)
    weights = _Upper("weights", Config(retain_graph=True), task.weights, adam, train_data_loader=task.upper)
    return [model, weights], {weights: [model]}, {model: [weights]}


def _teaching(task: Teaching, estimator: str) -> tuple[list[Any], dict[Any, Any], dict[Any, Any]]:
    def sgd(module: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=task.lr, momentum=task.momentum)

    config = Config(type=estimator, darts_alpha=RADIUS)
    unlabeled = [(images,) for images in task.unlabeled]
    adam = torch.optim.Adam(task.arch.parameters(), lr=task.upper_lr)
    teacher = _Teacher("teacher", config, task.teacher, sgd(task.teacher), train_data_loader=task.teacher_data)
    student = _Student("student", config, task.student, sgd(task.student), train_data_loader=(task.labeled, unlabeled))
    arch = _Arch("arch", Config(retain_graph=True), task.arch, adam, train_data_loader=task.validation)
    return [teacher, student, arch], {arch: [teacher]}, {teacher: [student, arch], student: [arch]}
