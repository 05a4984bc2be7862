"""A small LBT with everything that makes purity hard: batch norm, dropout, shuffled and augmented data."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mlo
from problems.lbt import ArchValidate, StudentTeach, TeacherTrain


class NoisyTeacher(nn.Module):
    """A network mixed by architecture weights, with batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 8), nn.Linear(5, 8)
        self.norm, self.drop, self.head = nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3)

    def forward(self, images: Tensor, weights: Tensor) -> Tensor:
        mix = weights.softmax(dim=0)
        mixed = mix[0] * torch.relu(self.one(images)) + mix[1] * torch.tanh(self.two(images))
        return self.head(self.drop(self.norm(mixed)))


class Weights(nn.Module):
    """Two architecture weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(2))

    def forward(self) -> Tensor:
        return self.weights


def noisy_student() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3))


def loader(size: int = 20, *, labels: bool = True) -> DataLoader:
    """Shuffled batches of 5, with noise drawn from the global generator as augmentation does."""
    images = torch.randn(size, 5)

    def noised(items: list) -> list[Tensor]:
        columns = [torch.stack(column) for column in zip(*items, strict=True)]
        return [columns[0] + 0.1 * torch.randn_like(columns[0]), *columns[1:]]

    data = TensorDataset(images, torch.randint(3, (size,))) if labels else TensorDataset(images)
    return DataLoader(data, batch_size=5, shuffle=True, collate_fn=noised)


def noisy_lbt(seed: int = 0, *, student: dict | None = None, arch: dict | None = None) -> list[mlo.Problem]:
    """The three levels with SGD, Adam and Adam; ``student`` and ``arch`` are further arguments of those problems."""
    torch.manual_seed(seed)
    teacher, taught, weights = NoisyTeacher(), noisy_student(), Weights()
    sgd = torch.optim.SGD(teacher.parameters(), lr=0.1, momentum=0.9)
    return [
        TeacherTrain(
            "teacher",
            module=teacher,
            optimizer=sgd,
            data=loader(),
            scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 20),
        ),
        StudentTeach(
            "student",
            module=taught,
            optimizer=torch.optim.Adam(taught.parameters(), lr=0.01),
            data={"labeled": loader(), "unlabeled": loader(15, labels=False)},
            **(student or {}),
        ),
        ArchValidate(
            "arch",
            module=weights,
            optimizer=torch.optim.Adam(weights.parameters(), lr=0.01),
            data=loader(),
            **(arch or {}),
        ),
    ]
