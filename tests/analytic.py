"""Analytic multi-level problems, listed once: quadratics on every shape of graph, and their closed form.

A problem's variables t minimize t'At/2 + t'(b + sum_r B_r x_r), so its solution is -A^-1 (b + sum_r B_r x_r), which the
closed form differentiates by itself, with torch.linalg.solve and nothing of mlo.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import mlo

SIZE = 3


class Point(nn.Module):
    """A vector of variables."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value.clone())

    def forward(self) -> Tensor:
        return self.value


@dataclass(frozen=True)
class Shape:
    """Problems, lowest first: {name: what it reads}; the tops are those in ``tops``."""

    name: str
    reads: dict[str, tuple[str, ...]]
    tops: tuple[str, ...] = ("top",)

    def __str__(self) -> str:
        return self.name


SHAPES = [
    Shape("two levels", {"low": ("top",), "top": ("low",)}),
    Shape("chain", {"low": ("top",), "mid": ("low",), "top": ("mid",)}),
    Shape("V", {"low": ("top",), "mid": ("low", "top"), "top": ("low", "mid")}),
    Shape(
        "diamond",
        {"low": ("top",), "left": ("low",), "right": ("low",), "top": ("left", "right")},
    ),
    Shape(
        "four levels",
        {"a": ("top",), "b": ("a", "top"), "c": ("b", "a"), "top": ("c", "b", "a")},
    ),
    Shape("two tops", {"low": ("one", "two"), "one": ("low",), "two": ("low",)}, tops=("one", "two")),
]


@dataclass
class Quadratics:
    """Random quadratics on a shape, at the solutions of the lower problems."""

    shape: Shape
    own: dict[str, Tensor] = field(default_factory=dict)
    shift: dict[str, Tensor] = field(default_factory=dict)
    mixed: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def make(shape: Shape, seed: int = 0, device: torch.device | str = "cpu") -> Quadratics:
        draw = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=draw, dtype=torch.float64).to(device)

        made = Quadratics(shape)
        for name, reads in shape.reads.items():
            root = normal(SIZE, SIZE)
            made.own[name] = root @ root.T / SIZE + torch.eye(SIZE, dtype=torch.float64, device=device)
            made.shift[name] = normal(SIZE)
            for read in reads:
                made.mixed[name, read] = normal(SIZE, SIZE)
        for top in shape.tops:
            made.values[top] = normal(SIZE)
        made.values = made.solutions(made.values)
        return made

    def pull(self, name: str, values: dict[str, Tensor]) -> Tensor:
        """B + sum_r B_r x_r."""
        return self.shift[name] + sum(self.mixed[name, read] @ values[read] for read in self.shape.reads[name])

    def solutions(self, tops: dict[str, Tensor]) -> dict[str, Tensor]:
        values = dict(tops)
        for name in self.shape.reads:
            if name not in self.shape.tops:
                values[name] = -torch.linalg.solve(self.own[name], self.pull(name, values))
        return values

    def top_loss(self, name: str, values: dict[str, Tensor]) -> Tensor:
        """A top's loss has curvature in what it reads too, so that its cotangents depend on the solutions."""
        reads = sum(values[read].square().sum() + values[read].sin().sum() for read in self.shape.reads[name])
        return values[name] @ self.own[name] @ values[name] / 2 + values[name] @ self.pull(name, values) + reads

    def closed_form(self, name: str) -> Tensor:
        """The hypergradient of a top problem."""
        tops = {top: self.values[top].clone().requires_grad_() for top in self.shape.tops}
        return torch.autograd.grad(self.top_loss(name, self.solutions(tops)), tops[name])[0]

    def problems(self, lr: float = 0.05) -> list[mlo.Problem]:
        made = []
        for name in self.shape.reads:
            module = Point(self.values[name])
            optimizer = torch.optim.SGD(module.parameters(), lr=lr)
            made.append(_problem_class(self, name)(name, module=module, optimizer=optimizer))
        return made


def _problem_class(quadratics: Quadratics, name: str) -> type[mlo.Problem]:
    """A problem class whose loss has the signature that the shape asks for."""
    reads = quadratics.shape.reads[name]

    def evaluate(self: mlo.Problem, problems: dict[str, mlo.Problem]) -> Tensor:
        values = {read: problem() for read, problem in problems.items()} | {name: self()}
        if name in quadratics.shape.tops:
            return quadratics.top_loss(name, values)
        return values[name] @ quadratics.own[name] @ values[name] / 2 + values[name] @ quadratics.pull(name, values)

    namespace: dict[str, object] = {"evaluate": evaluate}
    exec(  # the signature declares the graph, so it has to be written out
        f"def loss(self, batch, {', '.join(reads)}):\n"
        f"    return evaluate(self, dict({', '.join(f'{r}={r}' for r in reads)}))",
        namespace,
    )
    return type(f"Quadratic_{name}", (mlo.Problem,), {"loss": namespace["loss"]})
