"""Hand-written loops of Learning by Teaching, in plain PyTorch, as a careful researcher would write them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.peers.by_hand import combined, dot
from benchmarks.peers.workloads import RADIUS, Teaching

Vector = Sequence[Tensor]


class Teach:
    """A round: one step of the teacher, one of the student, one of the architecture."""

    def __init__(self, task: Teaching, estimator: str) -> None:
        self._task = task
        self._compute = {"darts": self._by_differences, "one_step": self._by_products}[estimator]
        self._mix = task.arch.mix
        self._optimizer = torch.optim.Adam([self._mix], lr=task.upper_lr)
        self._teacher, self._student = list(task.teacher.parameters()), list(task.student.parameters())
        self._steps = [
            torch.optim.SGD(group, lr=task.lr, momentum=task.momentum) for group in (self._teacher, self._student)
        ]
        self._buffers: list[list[Tensor] | None] = [None, None]
        parts = task.teacher_data, task.labeled, task.unlabeled, task.validation
        self._batches = zip(*(itertools.cycle(part) for part in parts), strict=False)

    def round(self) -> None:
        """One round, which is timed."""
        self.gradient()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def gradient(self) -> list[Tensor]:
        """Take the two lower steps, and return the architecture gradient after them."""
        self._mix.grad = self._compute()
        return [self._mix.grad]

    def _by_differences(self) -> Tensor:
        """By finite differences, in place as in DARTS; the student's two points share the pseudo-labels."""
        task, teacher, student, mix = self._task, self._task.teacher, self._task.student, self._mix
        data, labeled, unlabeled, validation = next(self._batches)
        teacher_before = _step(self._steps[0], self._teacher, task.teacher_loss(teacher, mix.detach(), data))
        soft = teacher(unlabeled, mix).softmax(1)
        pseudo = soft.detach().requires_grad_()
        loss = task.student_loss(student, pseudo.detach(), labeled, unlabeled)
        student_before = _step(self._steps[1], self._student, loss)
        loss = task.arch_loss(teacher, mix, student, validation)
        sizes = len(self._teacher), len(self._student)
        found = torch.autograd.grad(loss, [*self._teacher, *self._student, mix])
        v_teacher, v_student, total = found[: sizes[0]], found[sizes[0] : -1], found[-1]
        on_pseudo = self._difference(
            self._student,
            student_before,
            v_student,
            lambda: torch.autograd.grad(task.student_loss(student, pseudo, labeled, unlabeled), pseudo)[0],
        )
        *through, direct = torch.autograd.grad(soft, [*self._teacher, mix], on_pseudo)
        v_teacher = combined(v_teacher, through, 1.0)
        return (
            total
            + direct
            + self._difference(
                self._teacher,
                teacher_before,
                v_teacher,
                lambda: torch.autograd.grad(task.teacher_loss(teacher, mix, data), mix)[0],
            )
        )

    def _difference(self, parameters: Vector, before: Vector, v: Vector, evaluate: object) -> Tensor:
        size = dot(v, v) ** 0.5
        now = [p.detach().clone() for p in parameters]
        found = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                torch._foreach_copy_(parameters, combined(before, v, sign * RADIUS / size))
            found.append(evaluate())
        with torch.no_grad():
            torch._foreach_copy_(parameters, now)
        return (found[0] - found[1]) * (-self._task.lr * size / (2 * RADIUS))

    def _by_products(self) -> Tensor:
        """By autograd, through one graph with all three losses and both steps."""
        task, mix = self._task, self._mix
        data, labeled, unlabeled, validation = next(self._batches)
        teacher = self._stepped(0, task.teacher, self._teacher, lambda run: task.teacher_loss(run, mix, data))
        pseudo = teacher(unlabeled, mix).softmax(1)
        student = self._stepped(
            1, task.student, self._student, lambda run: task.student_loss(run, pseudo, labeled, unlabeled)
        )
        gradient = torch.autograd.grad(task.arch_loss(teacher, mix, student, validation), mix)[0]
        with torch.no_grad():
            torch._foreach_copy_(self._teacher, list(teacher.parameters.values()))
            torch._foreach_copy_(self._student, list(student.parameters.values()))
        return gradient

    def _stepped(self, index: int, module: nn.Module, parameters: Vector, loss: object) -> _WithParameters:
        """The module after one differentiable step of SGD with momentum."""
        names = [name for name, _ in module.named_parameters()]
        start = _WithParameters(module, dict(zip(names, parameters, strict=True)))
        found = torch.autograd.grad(loss(start), parameters, create_graph=True)
        last = self._buffers[index]
        buffers = found if last is None else combined(found, last, self._task.momentum)
        self._buffers[index] = [b.detach() for b in buffers]
        return _WithParameters(module, dict(zip(names, combined(parameters, buffers, -self._task.lr), strict=True)))


class _WithParameters:
    """A module with other parameters."""

    def __init__(self, module: nn.Module, parameters: dict[str, Tensor]) -> None:
        self.module, self.parameters = module, parameters

    def __call__(self, *args: Tensor) -> Tensor:
        return functional_call(self.module, self.parameters, args)


def _step(optimizer: torch.optim.Optimizer, parameters: Vector, loss: Tensor) -> list[Tensor]:
    """Take a step of the optimizer, and return the parameters before it."""
    before = [p.detach().clone() for p in parameters]
    for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        p.grad = g
    optimizer.step()
    optimizer.zero_grad()
    return before
