"""The networks, losses and data of the workload LBT, the same for every library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


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


def teaching(width: int, side: int, size: int, classes: int, batches: int, *, dtype: torch.dtype) -> Teaching:
    """Make the workload, with ``batches`` of ``size`` images of ``side`` times ``side`` pixels."""
    nets = Teacher(width, classes), student(width, classes), Architecture()

    def images() -> Tensor:
        return torch.randn(size, 3, side, side).to(dtype)

    def labeled() -> list[Batch]:
        return [(images(), torch.randint(classes, (size,))) for _ in range(batches)]

    teacher, taught, arch = (net.to(dtype) for net in nets)
    return Teaching(teacher, taught, arch, labeled(), labeled(), [images() for _ in range(batches)], labeled())
