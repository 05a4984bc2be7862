"""A step of Learning by Teaching by hand: equations (4) to (12) as they are written, one product after another.

The passes are those of the authors' later code. The teacher's part takes one central difference. The student's part
computes a virtual step of the teacher again. It takes a central difference around the student, and computes the
pseudo-labels again at each of its two points; for each point follows a central difference around the teacher. Labeled
and unlabeled images go through the student separately. The direct dependence of the pseudo-labels on the architecture
is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Vector = Sequence[Tensor]
Run = Callable[..., Tensor]


class Networks(Protocol):
    """The networks and batches; see :class:`benchmarks.lbt_step.Task`."""

    teacher: nn.Module
    student: nn.Module
    architecture: nn.Module
    training: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    unlabeled: Tensor

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers of teacher, student and architecture."""


class LbtByHand:
    """The loop by hand.

    Args:
        task: a :class:`benchmarks.lbt_step.Task`.
        radius: the radius of the central differences, equation (8).

    Attributes:
        optimizers: those of the task.
    """

    def __init__(self, task: Any, radius: float = 0.01) -> None:
        self._task: Networks = task
        self._radius = radius
        self._teacher, self._student = list(task.teacher.parameters()), list(task.student.parameters())
        self._alphas = list(task.architecture.parameters())
        self.optimizers = task.optimizers()

    def step(self) -> None:
        """One step of the architecture, on the sum of both parts, then one of the teacher and one of the student."""
        task = self._task
        gradient = [a + b for a, b in zip(self.teacher_part(), self.student_part(), strict=True)]
        self._real_step(2, self._alphas, gradient)
        loss = self._on_training(task.teacher)
        self._real_step(0, self._teacher, torch.autograd.grad(loss, self._teacher))
        loss = self._taught(task.student, task.teacher)
        self._real_step(1, self._student, torch.autograd.grad(loss, self._student))

    def teacher_part(self) -> list[Tensor]:
        """Equations (7) and (8): the gradient with respect to both matrices of the architecture."""
        stepped = self._teacher_after_its_step()
        images, labels = self._task.validation
        loss = F.cross_entropy(
            self._with_weights(self._task.teacher, stepped)(images, self._task.architecture()), labels
        )
        found = torch.autograd.grad(loss, [*self._alphas, *stepped])
        product = self._teacher_product(found[len(self._alphas) :])
        return [direct - self._rate(0) * p for direct, p in zip(found, product, strict=False)]

    def student_part(self) -> list[Tensor]:
        """Equations (9) to (12): the gradient with respect to both matrices of the architecture."""
        task = self._task
        teacher_weights = self._teacher_after_its_step()
        teacher = self._with_weights(task.teacher, teacher_weights)
        loss = self._taught(self._with_weights(task.student, self._student), teacher)
        student_weights = self._stepped(1, self._student, torch.autograd.grad(loss, self._student))
        images, labels = task.validation
        loss = F.cross_entropy(self._with_weights(task.student, student_weights)(images), labels)
        vector = torch.autograd.grad(loss, student_weights)
        size = _norm(vector)
        found = []
        for sign in (1, -1):
            moved = [w.detach() + sign * self._radius / size * v for w, v in zip(self._student, vector, strict=True)]
            with torch.no_grad():
                predicted = self._with_weights(task.student, moved)(task.unlabeled)
            on_pseudo = F.cross_entropy(predicted, self._pseudo_labels(teacher))
            found.append(self._teacher_product(torch.autograd.grad(on_pseudo, teacher_weights)))
        scale = self._rate(0) * self._rate(1) * size / (2 * self._radius)
        return [scale * (plus - minus) for plus, minus in zip(*found, strict=True)]

    def _teacher_product(self, vector: Vector) -> list[Tensor]:
        """Equation (8): the mixed second derivative of the teacher's training loss, applied to `vector`."""
        size = _norm(vector)
        sides = []
        for sign in (1, -1):
            moved = [w.detach() + sign * self._radius / size * v for w, v in zip(self._teacher, vector, strict=True)]
            sides.append(
                torch.autograd.grad(self._on_training(self._with_weights(self._task.teacher, moved)), self._alphas)
            )
        return [size / (2 * self._radius) * (plus - minus) for plus, minus in zip(*sides, strict=True)]

    def _teacher_after_its_step(self) -> list[Tensor]:
        """W' of equation (4)."""
        loss = self._on_training(self._with_weights(self._task.teacher, self._teacher))
        return self._stepped(0, self._teacher, torch.autograd.grad(loss, self._teacher))

    def _on_training(self, teacher: Run) -> Tensor:
        images, labels = self._task.training
        return F.cross_entropy(teacher(images, self._task.architecture()), labels)

    def _taught(self, student: Run, teacher: Run) -> Tensor:
        """The student's training loss of equation (5)."""
        images, labels = self._task.training
        with torch.no_grad():
            soft = self._pseudo_labels(teacher)
        return F.cross_entropy(student(images), labels) + F.cross_entropy(student(self._task.unlabeled), soft)

    def _pseudo_labels(self, teacher: Run) -> Tensor:
        architecture = [matrix.detach() for matrix in self._task.architecture()]
        return teacher(self._task.unlabeled, type(self._task.architecture())(*architecture)).softmax(dim=1)

    def _with_weights(self, network: nn.Module, weights: Vector) -> Run:
        """The network with other weights; calling it does not change the running statistics."""
        names = [name for name, _ in network.named_parameters()]
        tensors = dict(zip(names, weights, strict=True)) | {n: b.clone() for n, b in network.named_buffers()}
        return lambda *inputs: functional_call(network, tensors, inputs)

    def _stepped(self, index: int, weights: Vector, gradient: Vector) -> list[Tensor]:
        """The weights after a virtual step of their optimizer, including momentum and weight decay."""
        (group,) = self.optimizers[index].param_groups
        states = self.optimizers[index].state
        moved = []
        for w, g in zip(weights, gradient, strict=True):
            direction = g + group["weight_decay"] * w.detach()
            buffer = states[w].get("momentum_buffer")
            direction = direction if buffer is None else direction + group["momentum"] * buffer
            moved.append((w.detach() - group["lr"] * direction).requires_grad_())
        return moved

    def _rate(self, index: int) -> float:
        rate: float = self.optimizers[index].param_groups[0]["lr"]
        return rate

    def _real_step(self, index: int, weights: Vector, gradient: Vector) -> None:
        for w, g in zip(weights, gradient, strict=True):
            w.grad = g
        self.optimizers[index].step()
        self.optimizers[index].zero_grad()


def _norm(vector: Vector) -> Tensor:
    return torch.stack([v.norm() for v in vector]).norm()
