"""Data reweighting: find wrong training labels with the help of a few correct ones.

    python examples/reweighting.py

Half of the training labels are wrong. The lower level trains a linear classifier on weighted training images. The upper
level trains the weights, one for each image, on the classifier's loss on 100 validation images with correct labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlo
from problems.data.options import Data


class Weights(nn.Module):
    """One weight in (0, 1) for each training image."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(count))

    def forward(self) -> Tensor:
        return self.logits.sigmoid()


class Fit(mlo.Problem):
    """The lower level: the classifier, trained on the weighted training images."""

    def loss(self, batch: tuple[Tensor, Tensor], weights: mlo.Problem) -> Tensor:
        images, labels = batch
        losses = F.cross_entropy(self(images), labels, reduction="none")
        penalty = 1e-3 * sum(p.square().sum() for p in self.params.values())
        return (weights() * losses).mean() + penalty


class Validate(mlo.Problem):
    """The upper level: the weights, trained on the validation images."""

    def loss(self, batch: tuple[Tensor, Tensor], classifier: mlo.Problem) -> Tensor:
        images, labels = batch
        return F.cross_entropy(classifier(images), labels)


def main(steps: int = 150, hypergradient: object = "neumann") -> float:
    """Train for ``steps`` rounds; return the area under the ROC curve for detecting right labels by their weight."""
    torch.manual_seed(0)
    data = Data(source="digits", train_size=600, validation_size=100, unlabeled_size=500).splits(seed=0)
    train, validation, test = (part.load() for part in (data.train, data.validation, data.test))
    right = torch.rand(600) < 0.5
    labels = torch.where(right, train.labels, (train.labels + torch.randint(1, 10, (600,))) % 10)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    weights = Weights(600)
    engine = mlo.Engine(
        [
            Fit(
                "classifier",
                module=model,
                optimizer=torch.optim.SGD(model.parameters(), lr=0.3),
                data=[(train.images, labels)],
                steps=20,
            ),
            Validate(
                "weights",
                module=weights,
                optimizer=torch.optim.Adam(weights.parameters(), lr=0.1),
                data=[tuple(validation)],
            ),
        ],
        hypergradient=hypergradient,
    )
    engine.run(steps)
    found = weights()
    area = float((found[right][:, None] > found[~right][None]).float().mean())
    accuracy = float((model(test.images.to(engine.device)).argmax(1).cpu() == test.labels).float().mean())
    print(f"right labels have the larger weight in {100 * area:.1f} % of pairs; test accuracy {100 * accuracy:.1f} %")
    return area


if __name__ == "__main__":
    main()
