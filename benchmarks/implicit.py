"""The implicit estimators with several options, on small problems: relative error and residual of a hypergradient.

    OMP_NUM_THREADS=1 python -m benchmarks.implicit

The lower problems are trained for a while. The reference is conjugate gradient until it has converged, in float64.
Prints the table of docs/estimators.md as Markdown.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlo

REFERENCE = {"kind": "cg", "iterations": 2000, "tolerance": 1e-12}
RATE = 0.1  # of the lower problems
OPTIONS: list[dict[str, object]] = [
    *({"kind": "cg", "iterations": n} for n in (10, 20, 50)),
    {"kind": "neumann", "terms": 10, "rate": RATE},
    *({"kind": "neumann", "terms": n} for n in (10, 20, 50)),
    {"kind": "nystrom", "rank": 10, "damping": 0.01},
    *({"kind": "nystrom", "rank": n} for n in (10, 20, 50)),
]


class Upper(nn.Module):
    """Positive numbers: penalties of parameters, or weights of examples."""

    def __init__(self, count: int, start: float) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.full((count,), start))

    def forward(self) -> Tensor:
        """Return all numbers, (N,)."""
        return self.logs.exp()


class Penalized(mlo.Problem):
    """Fits a model with a penalty for each of its weights."""

    criterion: Callable[[Tensor, Tensor], Tensor]

    def loss(self, batch: tuple[Tensor, Tensor], upper: mlo.Problem) -> Tensor:
        """The mean loss, plus the penalties."""
        flat = torch.cat([p.reshape(-1) for p in self.params.values()])
        return self.criterion(self(batch[0]), batch[1]) + (upper() * flat.square()).sum()


class Weighted(mlo.Problem):
    """Fits a model to weighted examples, with one small L2 penalty."""

    criterion: Callable[[Tensor, Tensor], Tensor]
    penalty: float

    def loss(self, batch: tuple[Tensor, Tensor], upper: mlo.Problem) -> Tensor:
        """The weighted mean loss, plus the penalty."""
        squares = torch.stack([p.square().sum() for p in self.params.values()]).sum()
        each = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        return (upper() * each).mean() + self.penalty * squares


class Judge(mlo.Problem):
    """The loss of the trained model on other data."""

    criterion: Callable[[Tensor, Tensor], Tensor]

    def loss(self, batch: tuple[Tensor, Tensor], model: mlo.Problem) -> Tensor:
        """The mean loss."""
        return self.criterion(model(batch[0]), batch[1])


def problems(
    kind: type[Penalized] | type[Weighted],
    model: nn.Module,
    classes: int,
    *,
    features: int,
    start: float,
    penalty: float = 0.0,
    count: int = 200,
) -> list[mlo.Problem]:
    """Two levels on random data of a random linear model with noise; regression if ``classes`` is 1."""
    x = torch.randn(2 * count, features) * torch.linspace(0.2, 2.0, features)
    scores = x @ torch.randn(features, classes) / features**0.5 + 0.5 * torch.randn(2 * count, classes)
    y, criterion = (scores, F.mse_loss) if classes == 1 else (scores.argmax(1), F.cross_entropy)
    upper = Upper(sum(p.numel() for p in model.parameters()) if kind is Penalized else count, start)
    low = kind(
        "model",
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), RATE, momentum=0.9),
        data=[(x[:count], y[:count])],
        steps=300,
        reads={"upper": "upper"},
    )
    top = Judge(
        "upper", module=upper, optimizer=torch.optim.SGD(upper.parameters(), 0.0), data=[(x[count:], y[count:])]
    )
    low.criterion = top.criterion = criterion
    low.penalty = penalty
    return [low, top]


def workloads() -> dict[str, list[mlo.Problem]]:
    """The problems by name."""
    mlp = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 5))
    return {
        "ridge": problems(Penalized, nn.Linear(30, 1, bias=False), 1, features=30, start=-4.0),
        "logistic": problems(Penalized, nn.Linear(30, 5, bias=False), 5, features=30, start=-5.0),
        "cleaning, linear": problems(Weighted, nn.Linear(30, 5), 5, features=30, start=0.0, penalty=1e-2),
        "cleaning, linear, small penalty": problems(
            Weighted, nn.Linear(30, 5), 5, features=30, start=0.0, penalty=1e-3
        ),
        "cleaning, MLP": problems(Weighted, mlp, 5, features=20, start=0.0, penalty=0.1),
    }


def main() -> None:
    """Measure and print."""
    torch.manual_seed(0)
    rows = workloads()
    print("| options | " + " | ".join(rows) + " |\n| --- |" + " --- |" * len(rows))
    exact = {}
    for name, stack in rows.items():
        mlo.Engine(stack, REFERENCE, device="cpu").run(3)
        stack[0].steps = 1
        found = mlo.Engine(stack, REFERENCE, device="cpu").hypergradient("upper", torch.float64)
        assert found.metrics["model/residual"] < 1e-9, f"{name}: its Hessian is not positive definite"
        exact[name] = found["logs"]
    for options in OPTIONS:
        cells = []
        for name, stack in rows.items():
            found = mlo.Engine(stack, options, device="cpu").hypergradient("upper")
            error = ((found["logs"] - exact[name]).norm() / exact[name].norm()).item()
            cells.append(f"{error:.1e} ({found.metrics['model/residual']:.1e})")
        shown = ", ".join(str(v) if k == "kind" else f"{k} {v}" for k, v in options.items())
        print(f"| {shown} | {' | '.join(cells)} |")


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
