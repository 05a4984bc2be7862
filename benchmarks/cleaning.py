"""Hyper-cleaning on digits: each estimator finds wrong training labels. Prints the table of docs/cleaning.md.

    OMP_NUM_THREADS=1 python benchmarks/cleaning.py --validation 100 --seeds 5

Half of 600 training labels are replaced with a wrong class. Each training image has a weight. The weights are trained
for 150 rounds on the loss of clean validation images, through 20 steps of a classifier in each round; then a new
classifier is trained with these weights. For comparison: equal weights, only the right labels (an oracle), and only
the validation images. Prints the table as Markdown.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlo
from problems.data.images import Images
from problems.data.options import Data

ROUNDS, STEPS, FINAL = 150, 20, 1500
ESTIMATORS: dict[str, object] = {
    "unrolled": "unrolled",
    "cg, 10 iterations, damped": {"kind": "cg", "iterations": 10, "damping": 0.01},
    "neumann, 10 terms": {"kind": "neumann", "terms": 10, "rate": 0.3},
    "one_step": "one_step",
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
    "MLP 64-32-10": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
}


class Weights(nn.Module):
    """One weight in (0, 1) for each training image."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(count))

    def forward(self) -> Tensor:
        """Return all weights, (N,)."""
        return self.logits.sigmoid()


def fitting_loss(logits: Tensor, labels: Tensor, weights: Tensor, parameters: list[Tensor]) -> Tensor:
    """The weighted cross-entropy plus a small L2 penalty."""
    penalty = sum((p.square().sum() for p in parameters), torch.zeros(()))
    return (weights * F.cross_entropy(logits, labels, reduction="none")).mean() + 1e-3 * penalty


class Fit(mlo.Problem):
    """The lower level: the classifier, trained on the weighted training images."""

    def loss(self, batch: Images, weights: mlo.Problem) -> Tensor:
        """See :func:`fitting_loss`."""
        return fitting_loss(self(batch.images), batch.labels, weights(), list(self.params.values()))


class Validate(mlo.Problem):
    """The upper level: the weights, trained on the clean validation images."""

    def loss(self, batch: Images, classifier: mlo.Problem) -> Tensor:
        """The validation loss."""
        return F.cross_entropy(classifier(batch.images), batch.labels)


def learn_weights(model: nn.Module, noisy: Images, validation: Images, estimator: object) -> Tensor:
    """Train the weights with an estimator."""
    weights = Weights(len(noisy.labels))
    problems = [
        Fit("classifier", module=model, optimizer=torch.optim.SGD(model.parameters(), 0.3), data=[noisy], steps=STEPS),
        Validate("weights", module=weights, optimizer=torch.optim.Adam(weights.parameters(), 0.1), data=[validation]),
    ]
    mlo.Engine(problems, estimator, device="cpu").run(ROUNDS)
    return weights().detach()


def accuracy(model: nn.Module, train: Images, weights: Tensor, test: Images) -> float:
    """Train a classifier with these weights, and return its test accuracy."""
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for _ in range(FINAL):
        optimizer.zero_grad()
        fitting_loss(model(train.images), train.labels, weights, list(model.parameters())).backward()
        optimizer.step()
    return float((model(test.images).argmax(1) == test.labels).float().mean())


def f1_score(weights: Tensor, wrong: Tensor) -> float:
    """The F1 score of finding wrong labels by a weight below 0.5."""
    flagged = weights < 0.5
    hits = float((flagged & wrong).sum())
    return 2 * hits / max(float(flagged.sum() + wrong.sum()), 1.0)


def one_seed(make: Callable[[], nn.Module], validation: int, seed: int) -> dict[str, tuple[float, float | None]]:
    """Return {row: (accuracy, F1 score)} for one seed."""
    torch.manual_seed(seed)
    unlabeled = 600 - min(validation, 590)
    data = Data(source="digits", train_size=600, validation_size=validation, unlabeled_size=unlabeled).splits(seed)
    train, clean, test = (part.load() for part in (data.train, data.validation, data.test))
    wrong = torch.rand(600) < 0.5
    shifted = (train.labels + torch.randint(1, 10, (600,))) % 10
    noisy = Images(train.images, torch.where(wrong, shifted, train.labels))
    rows: dict[str, tuple[float, float | None]] = {
        "all weights alike": (accuracy(make(), noisy, torch.ones(600), test), None),
        "right labels alone (oracle)": (accuracy(make(), noisy, (~wrong).float(), test), None),
    }
    for name, estimator in ESTIMATORS.items():
        weights = learn_weights(make(), noisy, clean, estimator)
        rows[name] = (accuracy(make(), noisy, weights, test), f1_score(weights, wrong))
    alone = accuracy(make(), clean, torch.ones(validation), test)
    return {**rows, "validation images alone": (alone, None)}


def main() -> None:
    """Run all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--validation", type=int, default=100, help="number of clean validation images")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, starting at 0")
    options = parser.parse_args()
    tables = {m: [one_seed(make, options.validation, s) for s in range(options.seeds)] for m, make in MODELS.items()}
    print("| | " + " | ".join(MODELS) + " |\n|" + " --- |" * (len(MODELS) + 1))
    for row in next(iter(tables.values()))[0]:
        print(f"| {row} | " + " | ".join(_cell([seed[row] for seed in tables[m]]) for m in MODELS) + " |")


def _cell(results: list[tuple[float, float | None]]) -> str:
    scores = [f1 for _, f1 in results if f1 is not None]
    values = [[a for a, _ in results], scores] if scores else [[a for a, _ in results]]
    return " / ".join(f"{statistics.mean(v):.3f} ± {statistics.stdev(v):.3f}" for v in values)


if __name__ == "__main__":
    main()
