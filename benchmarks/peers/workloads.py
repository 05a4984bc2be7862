"""Synthetic, seeded data, and the networks and losses of the workloads, the same for every library."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
RIDGE = 1.0  # L2 penalty: makes the lower Hessian of the reweighted MLP positive definite, as implicit methods need
RADIUS = 0.01  # radius of the central differences, as in DARTS


class SampleWeights(nn.Module):
    """A weight for each training sample."""

    reads_losses = False

    def __init__(self, count: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(0.5 * torch.randn(count))

    def forward(self) -> Tensor:
        """Return all weights, in (0, 1)."""
        return self.logits.sigmoid()


class WeightNet(nn.Module):
    """Meta-weight-net: maps the loss of a sample to its weight."""

    reads_losses = True

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())

    def forward(self, losses: Tensor) -> Tensor:
        """The weights of samples with these losses."""
        return self.layers(losses.unsqueeze(1)).squeeze(1)


@dataclass
class Bilevel:
    """A model is trained on weighted samples, and the weights on the loss of the model on clean samples.

    Attributes:
        steps: the number of steps of the model for one hypergradient.
        trains: whether a round continues from the last one and also takes a step of the weights (meta-weight-net).
            Otherwise a round is one hypergradient, always from the same start.
    """

    model: nn.Sequential
    weights: nn.Module
    lower: list[Batch]
    upper: list[Batch]
    steps: int
    lr: float
    momentum: float
    trains: bool
    upper_lr: float = 1e-3
    drawn: tuple[Tensor, ...] | None = None

    def lower_loss(
        self, model: Callable[..., Tensor], weigh: Callable[..., Tensor], parameters: Iterable[Tensor], batch: Batch
    ) -> Tensor:
        """The weighted loss with its L2 penalty. Nothing is detached, so differences and exact products agree."""
        images, labels = batch
        losses = F.cross_entropy(model(images), labels, reduction="none")
        weights = weigh(losses) if self.weights.reads_losses else weigh()
        ridge = torch.stack([p.square().sum() for p in parameters]).sum()
        return (weights * losses).mean() + 0.5 * RIDGE * ridge

    def direction(self, like: Iterable[Tensor]) -> tuple[Tensor, ...]:
        """A vector for curvature products, drawn in float32; the same at each call."""
        draw = torch.Generator().manual_seed(1)
        if self.drawn is None:
            self.drawn = tuple(torch.randn(p.shape, generator=draw).to(p) for p in like)
        return self.drawn

    def upper_loss(self, model: Callable[..., Tensor], batch: Batch) -> Tensor:
        """The loss on clean samples."""
        images, labels = batch
        return F.cross_entropy(model(images), labels)


class Teacher(nn.Module):
    """Two cells, each a mixture of three operations."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.wide = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.narrow = nn.ModuleList(nn.Conv2d(width, width, 1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor, mix: Tensor) -> Tensor:
        """Return logits; ``mix`` has a row of three logits for each cell."""
        found = self.stem(images)
        for wide, narrow, norm, (a, b, c) in zip(self.wide, self.narrow, self.norms, mix.softmax(1), strict=True):
            pooled = F.avg_pool2d(found, 3, stride=1, padding=1)
            found = F.avg_pool2d(F.relu(norm(a * wide(found) + b * narrow(found) + c * pooled)), 2)
        return self.head(found.mean((2, 3)))


def student(width: int, classes: int) -> nn.Sequential:
    """A network with two convolutions."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, classes),
    )


class Architecture(nn.Module):
    """The logits of the mixture."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(0.5 * torch.randn(2, 3))

    def forward(self) -> Tensor:
        """Return the logits, one row for each cell."""
        return self.mix


@dataclass
class Teaching:
    """LBT: the teacher teaches the student with pseudo-labels; both validate the architecture."""

    teacher: Teacher
    student: nn.Sequential
    arch: Architecture
    teacher_data: list[Batch]
    labeled: list[Batch]
    unlabeled: list[Tensor]
    validation: list[Batch]
    lr: float = 0.05
    momentum: float = 0.9
    upper_lr: float = 1e-3
    trains: bool = True

    def teacher_loss(self, teacher: Callable[..., Tensor], mix: Tensor, batch: Batch) -> Tensor:
        """The loss of level 1."""
        images, labels = batch
        return F.cross_entropy(teacher(images, mix), labels)

    def student_loss(self, taught: Callable[..., Tensor], pseudo: Tensor, labeled: Batch, unlabeled: Tensor) -> Tensor:
        """The loss of level 2; labeled and unlabeled images are one batch."""
        images, labels = labeled
        ours, theirs = taught(torch.cat([images, unlabeled])).split([len(images), len(unlabeled)])
        return F.cross_entropy(ours, labels) + F.cross_entropy(theirs, pseudo)

    def arch_loss(
        self, teacher: Callable[..., Tensor], mix: Tensor, taught: Callable[..., Tensor], batch: Batch
    ) -> Tensor:
        """The loss of level 3."""
        images, labels = batch
        return F.cross_entropy(teacher(images, mix), labels) + F.cross_entropy(taught(images), labels)


Task = Bilevel | Teaching

#: {workload: {size: arguments of :func:`_bilevel`}}
_SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "mwn": {
        "full": {"sizes": (784, 256, 10), "count": 100, "steps": 1, "batches": 10},
        "small": {"sizes": (12, 8, 4), "count": 10, "steps": 1, "batches": 3},
    },
    "clean512": {
        "full": {"sizes": (784, 256, 10), "count": 512, "steps": 20},
        "small": {"sizes": (12, 8, 4), "count": 16, "steps": 4},
    },
    "clean8192": {
        "full": {"sizes": (784, 256, 10), "count": 8192, "steps": 36},
        "small": {"sizes": (12, 8, 4), "count": 24, "steps": 6},
    },
    "tiny": {
        "full": {"sizes": (16, 16, 10), "count": 32, "steps": 20},
        "small": {"sizes": (6, 5, 3), "count": 8, "steps": 3},
    },
}


def make(workload: str, size: str = "full", dtype: torch.dtype = torch.float32) -> Task:
    """Make a workload. ``size`` is "full", or "small" for tests; values are drawn in float32 and cast to ``dtype``."""
    torch.manual_seed(0)
    if workload == "lbt":
        return _teaching(*((16, 16, 32, 10, 5) if size == "full" else (4, 6, 5, 3, 2)), dtype=dtype)
    return _bilevel(**_SIZES[workload][size], trains=workload == "mwn", dtype=dtype)


def _bilevel(
    sizes: tuple[int, int, int], count: int, steps: int, trains: bool, dtype: torch.dtype, batches: int = 1
) -> Bilevel:
    inputs, hidden, classes = sizes
    model = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))
    weights = WeightNet() if trains else SampleWeights(count)
    truth = torch.randn(inputs, classes)

    def batch(size: int, flipped: float) -> Batch:
        images = torch.randn(size, inputs)
        labels = torch.where(torch.rand(size) < flipped, torch.randint(classes, (size,)), (images @ truth).argmax(1))
        return images.to(dtype), labels

    lower = [batch(count, 0.5) for _ in range(batches)]
    upper = [batch(min(count, 512), 0.0) for _ in range(batches)]
    momentum = 0.9 if trains else 0.0
    return Bilevel(model.to(dtype), weights.to(dtype), lower, upper, steps, 0.1, momentum, trains)


def _teaching(width: int, side: int, size: int, classes: int, batches: int, *, dtype: torch.dtype) -> Teaching:
    nets = Teacher(width, classes), student(width, classes), Architecture()

    def images() -> Tensor:
        return torch.randn(size, 3, side, side).to(dtype)

    def labeled() -> list[Batch]:
        return [(images(), torch.randint(classes, (size,))) for _ in range(batches)]

    teacher, taught, arch = (net.to(dtype) for net in nets)
    return Teaching(teacher, taught, arch, labeled(), labeled(), [images() for _ in range(batches)], labeled())
