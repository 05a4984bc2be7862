"""The workloads with TorchOpt: MetaSGD for differentiable steps, custom_root for the implicit methods."""

from __future__ import annotations

import itertools

import torch
import torchopt
from torch import Tensor
from torch.func import functional_call, grad

from benchmarks.peers.catalogue import ITERATIONS
from benchmarks.peers.libraries import Runner
from benchmarks.peers.workloads import Bilevel, Task, Teaching


def build(task: Task, estimator: str) -> Runner:
    """See :mod:`benchmarks.peers.libraries`."""
    if isinstance(task, Teaching):
        return _Teach(task)
    if estimator in ("cg", "neumann"):
        return _Implicit(task, estimator)
    return (_Reweighting if task.trains else _Cleaning)(task)


class _Cleaning:
    def __init__(self, task: Bilevel) -> None:
        self._task = task
        self._start = torchopt.extract_state_dict(task.model, by="copy")

    def gradient(self) -> list[Tensor]:
        task = self._task
        torchopt.recover_state_dict(task.model, self._start)
        optimizer = torchopt.MetaSGD(task.model, lr=task.lr)
        for _ in range(task.steps):
            optimizer.step(task.lower_loss(task.model, task.weights, task.model.parameters(), task.lower[0]))
        loss = task.upper_loss(task.model, task.upper[0])
        return list(torch.autograd.grad(loss, list(task.weights.parameters())))

    def round(self) -> None:
        self.gradient()


class _Reweighting:
    def __init__(self, task: Bilevel) -> None:
        self._task = task
        self._sgd = torchopt.MetaSGD(task.model, lr=task.lr, momentum=task.momentum)
        self._adam = torch.optim.Adam(task.weights.parameters(), lr=task.upper_lr)
        self._batches = zip(itertools.cycle(task.lower), itertools.cycle(task.upper), strict=False)

    def gradient(self) -> list[Tensor]:
        task, hyper = self._task, list(self._task.weights.parameters())
        lower, upper = next(self._batches)
        self._sgd.step(task.lower_loss(task.model, task.weights, list(task.model.parameters()), lower))
        found = torch.autograd.grad(task.upper_loss(task.model, upper), hyper)
        torchopt.stop_gradient(task.model)
        torchopt.stop_gradient(self._sgd)
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
        self._sgd = [torchopt.MetaSGD(net, lr=task.lr, momentum=task.momentum) for net in (task.teacher, task.student)]
        self._adam = torch.optim.Adam(task.arch.parameters(), lr=task.upper_lr)
        parts = task.teacher_data, task.labeled, task.unlabeled, task.validation
        self._batches = zip(*(itertools.cycle(part) for part in parts), strict=False)

    def gradient(self) -> list[Tensor]:
        task, mix = self._task, self._task.arch()
        data, labeled, unlabeled, validation = next(self._batches)
        self._sgd[0].step(task.teacher_loss(task.teacher, mix, data))
        pseudo = task.teacher(unlabeled, mix).softmax(1)
        self._sgd[1].step(task.student_loss(task.student, pseudo, labeled, unlabeled))
        mix.grad = torch.autograd.grad(task.arch_loss(task.teacher, mix, task.student, validation), mix)[0]
        for moved in (task.teacher, task.student, *self._sgd):
            torchopt.stop_gradient(moved)
        return [mix.grad]

    def round(self) -> None:
        self.gradient()
        self._adam.step()
        self._adam.zero_grad()


class _Implicit:
    """custom_root around T steps of SGD, which TorchOpt expects its user to write."""

    def __init__(self, task: Bilevel, estimator: str) -> None:
        self._task = task
        self._adam = torch.optim.Adam(task.weights.parameters(), lr=task.upper_lr)
        self._names = [n for n, _ in task.model.named_parameters()]
        self._hyper_names = [n for n, _ in task.weights.named_parameters()]
        self._parameters = tuple(p.detach().clone() for p in task.model.parameters())
        self._buffers = tuple(torch.zeros_like(p) for p in self._parameters)
        self._batches = zip(itertools.cycle(task.lower), itertools.cycle(task.upper), strict=False)
        if estimator == "cg":
            self._solve = torchopt.linear_solve.solve_cg(maxiter=ITERATIONS, rtol=0.0)
        else:  # its number of terms does not include the first
            self._solve = torchopt.linear_solve.solve_inv(ns=True, maxiter=ITERATIONS - 1, alpha=task.lr)

    def gradient(self) -> list[Tensor]:
        task, hyper = self._task, list(self._task.weights.parameters())
        lower, upper = next(self._batches)

        def lower_loss(parameters: tuple[Tensor, ...], hyper: tuple[Tensor, ...]) -> Tensor:
            def weigh(*args: Tensor) -> Tensor:
                return functional_call(task.weights, dict(zip(self._hyper_names, hyper, strict=True)), args)

            return task.lower_loss(lambda x: self._model(parameters, x), weigh, parameters, lower)

        def optimality(parameters: tuple[Tensor, ...], hyper: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return grad(lower_loss)(parameters, hyper)

        @torchopt.diff.implicit.custom_root(optimality, argnums=1, solve=self._solve)
        def solution(parameters: tuple[Tensor, ...], hyper: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return self._stepped(parameters, lambda p: lower_loss(p, hyper))

        after = solution(self._parameters, tuple(hyper))
        found = torch.autograd.grad(task.upper_loss(lambda x: self._model(after, x), upper), hyper)
        if task.trains:
            self._parameters = tuple(p.detach() for p in after)
            for parameter, gradient in zip(hyper, found, strict=True):
                parameter.grad = gradient
        return list(found)

    def round(self) -> None:
        self.gradient()
        if self._task.trains:
            self._adam.step()
            self._adam.zero_grad()

    def _model(self, parameters: tuple[Tensor, ...], images: Tensor) -> Tensor:
        return functional_call(self._task.model, dict(zip(self._names, parameters, strict=True)), (images,))

    def _stepped(self, parameters: tuple[Tensor, ...], loss: object) -> tuple[Tensor, ...]:
        task = self._task
        for _ in range(task.steps):
            with torch.enable_grad():
                start = tuple(p.detach().requires_grad_() for p in parameters)
                found = torch.autograd.grad(loss(start), start)
            with torch.no_grad():
                if task.momentum:
                    found = self._buffers = torch._foreach_add(found, self._buffers, alpha=task.momentum)
                parameters = torch._foreach_add(start, found, alpha=-task.lr)
        return tuple(p.requires_grad_() for p in parameters)
