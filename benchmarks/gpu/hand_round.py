"""A round of Learning by Teaching by hand: plain torch, all tensors of a level at once, no read on the host.

It takes the steps that the engine takes with `darts` and lookahead: momentum, weight decay and clipping for teacher and
student, Adam for the architecture. All tensors stay where they are, so a round can be one CUDA graph. It is the mark
that the engine is measured against.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.gpu.hand_optimizers import Adam, Clipped, Sgd, Vector, in_order_of, norm
from benchmarks.lbt_step import Task
from problems.nas import ArchitectureLogits

RADIUS = 0.01
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Precision(NamedTuple):
    """What is evaluated under autocast.

    Attributes:
        low: the dtype of autocast for all losses; None: no autocast.
        products: whether the differences are under autocast too.
    """

    low: torch.dtype | None = None
    products: bool = False


class Ahead(NamedTuple):
    """A virtual step: where it leads, as leaves, and the gradient that it takes."""

    parameters: list[Tensor]
    gradient: Clipped


class HandRound:
    """The networks and batches of a task, on one device, with their optimizers' states.

    Args:
        task: networks and batches; they are changed in place.
        clip_norm: of teacher and student; None: no clipping.
        held: whether the direct dependence of the pseudo-labels on the architecture is left out.
        precision: see :class:`Precision`.

    Attributes:
        losses: of teacher, student and architecture in the last round.
    """

    def __init__(
        self, task: Task, clip_norm: float | None = 5.0, held: bool = False, precision: Precision | None = None
    ) -> None:
        self._task, self._held, self._precision = task, held, precision or Precision()
        self._teacher, self._student = Sgd(task.teacher, clip_norm), Sgd(task.student, clip_norm)
        self._architecture = Adam(task.architecture)
        self._names = {m: [name for name, _ in m.named_parameters()] for m in (task.teacher, task.student)}
        self.losses = torch.zeros_like(self._teacher.rate).repeat(3)

    def step(self) -> None:
        """One step of the architecture, at virtual steps of the networks; then one step of each network."""
        with _without_statistics(self._task.teacher, self._task.student):
            gradient, judged = self._architecture_gradient()
        self._architecture.step(gradient)
        alphas = [alpha.detach() for alpha in self._architecture.parameters]
        with self._cast():
            taught = self._teacher_loss(None, alphas)
        self._teacher.step(self._teacher.clipped(torch.autograd.grad(taught, self._teacher.parameters)))
        with self._cast():
            with torch.no_grad(), _without_statistics(self._task.teacher):
                labels = self._pseudo_labels(None, alphas)
            learned = self._student_loss(None, labels)
        self._student.step(self._student.clipped(torch.autograd.grad(learned, self._student.parameters)))
        with torch.no_grad():
            self.losses.copy_(torch.stack([taught, learned, judged]))

    def _architecture_gradient(self) -> tuple[list[Tensor], Tensor]:
        """The hypergradient at the virtual steps, and the validation loss there."""
        alphas = [alpha.detach().requires_grad_() for alpha in self._architecture.parameters]
        with self._cast():
            loss = self._teacher_loss(None, alphas)
        teacher = self._ahead(self._teacher, loss)
        read = [alpha.detach() for alpha in alphas] if self._held else alphas
        with self._cast():
            labels = self._pseudo_labels(teacher.parameters, read)
            loss = self._student_loss(None, labels.detach())
        student = self._ahead(self._student, loss)
        with self._cast():
            judged = self._validation_loss(teacher.parameters, student.parameters, alphas)
        found = torch.autograd.grad(judged, [*alphas, *teacher.parameters, *student.parameters])
        end = len(alphas) + len(teacher.parameters)
        direct, of_teacher = found[: len(alphas)], in_order_of(teacher.parameters, found[len(alphas) : end])
        of_student = in_order_of(student.parameters, found[end:])
        if self._precision.low is not None and not self._precision.products:  # differences read labels in float32
            labels = self._pseudo_labels(teacher.parameters, read)
        for_labels = self._student_product(self._student.pulled(of_student, student.gradient), labels.detach())
        targets = [*teacher.parameters, *(() if self._held else alphas)]
        pulled = torch.autograd.grad(labels, targets, for_labels.to(labels.dtype))
        of_teacher = torch._foreach_add(of_teacher, in_order_of(of_teacher, pulled[: len(of_teacher)]))
        if not self._held:
            direct = torch._foreach_add(direct, pulled[len(of_teacher) :])
        product = self._teacher_product(self._teacher.pulled(of_teacher, teacher.gradient), alphas)
        return torch._foreach_add(direct, product), judged.detach()

    def _ahead(self, optimizer: Sgd, loss: Tensor) -> Ahead:
        gradient = optimizer.clipped(torch.autograd.grad(loss, optimizer.parameters))
        return Ahead(optimizer.virtual(gradient), gradient)

    def _student_product(self, vector: Vector, labels: Tensor) -> Tensor:
        """The mixed second derivative of the student's loss for its pseudo-labels, along a vector."""
        ends = []
        leaf = labels.requires_grad_()
        plus, minus, weight = _sides(self._student.detached(), vector)
        for parameters in (plus, minus):
            with self._cast(product=True):
                loss = self._student_loss(parameters, leaf)
            ends.append(torch.autograd.grad(loss, leaf)[0])
        return (ends[0] - ends[1]) * weight

    def _teacher_product(self, vector: Vector, alphas: list[Tensor]) -> list[Tensor]:
        """The mixed second derivative of the teacher's loss for the architecture, along a vector."""
        ends = []
        plus, minus, weight = _sides(self._teacher.detached(), vector)
        for parameters in (plus, minus):
            with self._cast(product=True):
                loss = self._teacher_loss(parameters, alphas)
            ends.append(torch.autograd.grad(loss, alphas))
        return [(one - other) * weight for one, other in zip(*ends, strict=True)]

    def _teacher_loss(self, parameters: Vector | None, alphas: Vector) -> Tensor:
        images, labels = self._task.training
        return F.cross_entropy(self._logits(parameters, alphas, images), labels)

    def _student_loss(self, parameters: Vector | None, pseudo_labels: Tensor) -> Tensor:
        images, labels = self._task.training
        both = self._call(self._task.student, parameters, torch.cat([images, self._task.unlabeled]))
        labeled, unlabeled = both.split([len(images), len(self._task.unlabeled)])
        return F.cross_entropy(labeled, labels) + F.cross_entropy(unlabeled, pseudo_labels)

    def _validation_loss(self, teacher: Vector, student: Vector, alphas: Vector) -> Tensor:
        images, labels = self._task.validation
        of_teacher = F.cross_entropy(self._logits(teacher, alphas, images), labels)
        return of_teacher + F.cross_entropy(self._call(self._task.student, student, images), labels)

    def _pseudo_labels(self, parameters: Vector | None, alphas: Vector) -> Tensor:
        return self._logits(parameters, alphas, self._task.unlabeled).softmax(dim=1)

    def _logits(self, parameters: Vector | None, alphas: Vector, images: Tensor) -> Tensor:
        return self._call(self._task.teacher, parameters, images, ArchitectureLogits(*alphas))

    def _call(self, module: nn.Module, parameters: Vector | None, *inputs: object) -> Tensor:
        if parameters is None:
            return module(*inputs)
        return functional_call(module, dict(zip(self._names[module], parameters, strict=True)), inputs)

    def _cast(self, product: bool = False) -> AbstractContextManager[object]:
        low, products = self._precision
        if low is None or (product and not products):
            return nullcontext()
        return torch.autocast(self._teacher.rate.device.type, low, cache_enabled=False)


def _sides(base: Vector, vector: Vector) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor]:
    """The two ends of a central difference, and the weight of the difference."""
    size = norm(vector)
    step = torch._foreach_mul(vector, torch.where(size > 0, RADIUS / size, 0.0))
    return torch._foreach_add(base, step), torch._foreach_sub(base, step), size / (2 * RADIUS)


@contextmanager
def _without_statistics(*modules: nn.Module) -> Iterator[None]:
    """A context in which batch norms keep no running statistics. In training, their outputs are the same."""
    places = [
        (layer, key, layer._buffers[key])
        for module in modules
        for layer in module.modules()
        for key in STATISTICS
        if key in layer._buffers
    ]
    for layer, key, _ in places:
        layer._buffers[key] = None
    try:
        yield
    finally:
        for layer, key, buffer in places:
            layer._buffers[key] = buffer
