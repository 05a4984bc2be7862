"""Learning by Teaching with your own networks, data and architecture.

    python examples/lbt_by_hand.py

The teacher is a convolutional network with one layer that mixes three kernel sizes; the architecture is the mixture.
The three losses come from problems/lbt.py; everything else is in this file.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import mlo
from problems.data.options import Data
from problems.lbt import ArchValidate, StudentTeach, TeacherTrain
from problems.search.students import small_student


class Mixture(nn.Module):
    """The architecture: one logit for each kernel size."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(3))

    def forward(self) -> Tensor:
        return self.logits.softmax(dim=0)


class Teacher(nn.Module):
    """A network that is called with images and the mixture."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(1, 16, size, padding=size // 2) for size in (1, 3, 5))
        self.head = nn.Sequential(
            nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)
        )

    def forward(self, images: Tensor, mixture: Tensor) -> Tensor:
        return self.head(sum(weight * branch(images) for weight, branch in zip(mixture, self.branches, strict=True)))


def main(steps: int = 100) -> dict[str, float]:
    """Search for ``steps`` rounds, and return the mixture found."""
    torch.manual_seed(0)
    data = Data(source="digits", train_size=200, validation_size=200, unlabeled_size=800).splits(seed=0)
    labeled, unlabeled = data.train.batches(50), data.unlabeled.batches(50)
    teacher, student, mixture = Teacher(), small_student(image_channels=1, classes=10), Mixture()

    def sgd(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)

    engine = mlo.Engine(
        [  # lowest level first
            TeacherTrain("teacher", module=teacher, optimizer=sgd(teacher), data=labeled),
            StudentTeach(
                "student",
                module=student,
                optimizer=sgd(student),
                data={"labeled": data.train.batches(50), "unlabeled": unlabeled},
                pseudo_weight=1.0,
            ),
            ArchValidate(
                "arch",
                module=mixture,
                optimizer=torch.optim.Adam(mixture.parameters(), lr=0.02),
                data=data.validation.batches(50),
                student_weight=1.0,
            ),
        ],
        hypergradient="one_step",
    )
    print(engine.graph)
    engine.run(steps=steps)
    found = dict(zip(("1x1", "3x3", "5x5"), mixture().tolist(), strict=True))
    print({name: round(value, 3) for name, value in engine.metrics().items()})
    print({name: round(weight, 3) for name, weight in found.items()})
    return found


if __name__ == "__main__":
    main()
