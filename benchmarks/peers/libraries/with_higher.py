"""The workloads with higher: a monkey-patched copy of the model and a differentiable optimizer."""

from __future__ import annotations

import itertools
from typing import Any

import higher
import torch
from torch import Tensor, nn

from benchmarks.peers.libraries import Runner
from benchmarks.peers.workloads import Bilevel, Task, Teaching


def build(task: Task, estimator: str) -> Runner:
    """See :mod:`benchmarks.peers.libraries`."""
    if isinstance(task, Teaching):
        return _Teach(task)
    return (_Reweighting if task.trains else _Cleaning)(task)


class _Cleaning:
    def __init__(self, task: Bilevel) -> None:
        self._task = task
        self._sgd = torch.optim.SGD(task.model.parameters(), lr=task.lr, momentum=task.momentum)

    def gradient(self) -> list[Tensor]:
        task = self._task
        with higher.innerloop_ctx(task.model, self._sgd) as (model, optimizer):
            for _ in range(task.steps):
                optimizer.step(task.lower_loss(model, task.weights, model.parameters(), task.lower[0]))
            loss = task.upper_loss(model, task.upper[0])
            return list(torch.autograd.grad(loss, list(task.weights.parameters())))

    def round(self) -> None:
        self.gradient()


class _Reweighting:
    def __init__(self, task: Bilevel) -> None:
        self._task = task
        self._sgd = torch.optim.SGD(task.model.parameters(), lr=task.lr, momentum=task.momentum)
        self._adam = torch.optim.Adam(task.weights.parameters(), lr=task.upper_lr)
        self._batches = zip(itertools.cycle(task.lower), itertools.cycle(task.upper), strict=False)

    def gradient(self) -> list[Tensor]:
        task, hyper = self._task, list(self._task.weights.parameters())
        lower, upper = next(self._batches)
        with higher.innerloop_ctx(task.model, self._sgd) as (model, optimizer):
            optimizer.step(task.lower_loss(model, task.weights, model.parameters(), lower))
            found = torch.autograd.grad(task.upper_loss(model, upper), hyper)
            _keep(task.model, self._sgd, model, optimizer)
        for parameter, gradient in zip(hyper, found, strict=True):
            parameter.grad = gradient
        return list(found)

    def round(self) -> None:
        self.gradient()
        self._adam.step()
        self._adam.zero_grad()


class _Teach:
    def __init__(self, task: Teaching) -> None:
        self._task = task
        self._sgd = [
            torch.optim.SGD(net.parameters(), lr=task.lr, momentum=task.momentum)
            for net in (task.teacher, task.student)
        ]
        self._adam = torch.optim.Adam(task.arch.parameters(), lr=task.upper_lr)
        parts = task.teacher_data, task.labeled, task.unlabeled, task.validation
        self._batches = zip(*(itertools.cycle(part) for part in parts), strict=False)

    def gradient(self) -> list[Tensor]:
        task, mix = self._task, self._task.arch()
        data, labeled, unlabeled, validation = next(self._batches)
        with (
            higher.innerloop_ctx(task.teacher, self._sgd[0]) as (teacher, teacher_optimizer),
            higher.innerloop_ctx(task.student, self._sgd[1]) as (student, student_optimizer),
        ):
            teacher_optimizer.step(task.teacher_loss(teacher, mix, data))
            pseudo = teacher(unlabeled, mix).softmax(1)
            student_optimizer.step(task.student_loss(student, pseudo, labeled, unlabeled))
            mix.grad = torch.autograd.grad(task.arch_loss(teacher, mix, student, validation), mix)[0]
            _keep(task.teacher, self._sgd[0], teacher, teacher_optimizer)
            _keep(task.student, self._sgd[1], student, student_optimizer)
        return [mix.grad]

    def round(self) -> None:
        self.gradient()
        self._adam.step()
        self._adam.zero_grad()


def _keep(module: nn.Module, sgd: torch.optim.Optimizer, moved: Any, optimizer: Any) -> None:
    """Copy the stepped parameters and momentum back into the module and its optimizer."""
    with torch.no_grad():
        for parameter, fast in zip(module.parameters(), moved.parameters(), strict=True):
            parameter.copy_(fast)
        for index, parameter in enumerate(module.parameters()):
            buffer = optimizer.state[0][index]["momentum_buffer"]
            sgd.state[parameter]["momentum_buffer"] = buffer.detach()
