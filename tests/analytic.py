"""Analytic multi-level problems, listed once: quadratics on every shape of graph, and their closed form.

A problem's variables t minimize t'At/2 + t'(b + sum_r B_r x_r), so its solution is -A^-1 (b + sum_r B_r x_r). The
closed form differentiates it with torch.linalg.solve, without mlo. ``Smooth`` adds terms whose curvature changes from
point to point.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

import mlo

SIZE, LR = 3, 0.05


class Point(nn.Module):
    """A vector of variables."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value.clone())

    def forward(self) -> Tensor:
        return self.value


@dataclass(frozen=True)
class Shape:
    """Problems, lowest first: {name: what it reads}; the tops are those in ``tops``.

    Where a lower problem reads one below that reads it in turn, its own gradient runs through that one: with
    ``inner_path`` the engine is to differentiate that share of it too; these problems then take one step a round.
    """

    name: str
    reads: dict[str, tuple[str, ...]]
    tops: tuple[str, ...] = ("top",)
    inner_path: bool = False

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
NESTED = Shape("nested", {"low": ("mid", "top"), "mid": ("low", "top"), "top": ("mid", "low")})
NESTED_WITH_INNER_PATH = replace(NESTED, name="nested with its inner path", inner_path=True)


@dataclass
class Quadratics:
    """Random quadratics on a shape, each lower problem at its solution, or all at random values if not ``settled``."""

    shape: Shape
    own: dict[str, Tensor] = field(default_factory=dict)
    shift: dict[str, Tensor] = field(default_factory=dict)
    mixed: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def make(cls, shape: Shape, seed: int = 0, device: torch.device | str = "cpu", settled: bool = True) -> Quadratics:
        draw = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=draw, dtype=torch.float64).to(device)

        made = cls(shape)
        for name, reads in shape.reads.items():
            root = normal(SIZE, SIZE)
            made.own[name] = root @ root.T / SIZE + torch.eye(SIZE, dtype=torch.float64, device=device)
            made.shift[name] = normal(SIZE)
            for read in reads:
                made.mixed[name, read] = normal(SIZE, SIZE)
        lower = [name for name in shape.reads if name not in shape.tops]
        for name in (*shape.tops, *lower):
            made.values[name] = normal(SIZE)
        if settled:
            made.values = made.solutions(made.values)
            for name in lower:  # what is left where the loss is not quadratic, or reads a lower problem above it
                there = {**made.values, name: made.values[name].clone().requires_grad_()}
                made.shift[name] = made.shift[name] - made.slope(name, there).detach()
        return made

    def pull(self, name: str, values: dict[str, Tensor]) -> Tensor:
        """B + sum_r B_r x_r."""
        return self.shift[name] + sum(self.mixed[name, read] @ values[read] for read in self.shape.reads[name])

    def solutions(self, tops: dict[str, Tensor]) -> dict[str, Tensor]:
        values = {**self.values, **tops}
        for name in self.shape.reads:
            if name not in self.shape.tops:
                values[name] = -torch.linalg.solve(self.own[name], self.pull(name, values))
        return values

    def loss(self, name: str, values: dict[str, Tensor]) -> Tensor:
        """A top's loss has curvature in what it reads too, so that its cotangents depend on the solutions."""
        loss = values[name] @ self.own[name] @ values[name] / 2 + values[name] @ self.pull(name, values)
        if name not in self.shape.tops:
            return loss
        return loss + sum(values[read].square().sum() + values[read].sin().sum() for read in self.shape.reads[name])

    def slope(self, name: str, values: dict[str, Tensor]) -> Tensor:
        """The gradient of a problem's loss for its own variables, with its graph."""
        return torch.autograd.grad(self.loss(name, values), values[name], create_graph=True)[0]

    def closed_form(self, name: str) -> Tensor:
        """The hypergradient of a top problem."""
        tops = {top: self.values[top].clone().requires_grad_() for top in self.shape.tops}
        return torch.autograd.grad(self.loss(name, self.solutions(tops)), tops[name])[0]

    def problems(
        self, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD, steps: int = 1, **options: object
    ) -> list[mlo.Problem]:
        """The lower ones with ``optimizer``, its ``options`` and ``steps`` a round; the tops with one step of SGD."""
        made: list[mlo.Problem] = []
        for name in self.shape.reads:
            module, is_top = Point(self.values[name]), name in self.shape.tops
            choice, given = (torch.optim.SGD, {}) if is_top else (optimizer, options)
            made.append(
                _problem_class(self, name)(
                    name,
                    module=module,
                    optimizer=choice(module.parameters(), **{"lr": LR, **given}),
                    steps=1 if is_top or (self.shape.inner_path and made) else steps,
                )
            )
        return made


class Smooth(Quadratics):
    """With terms in which every derivative mixes a problem's variables and what it reads."""

    def loss(self, name: str, values: dict[str, Tensor]) -> Tensor:
        """Convex for a lower problem: what the sine takes away from the curvature is less than the quadratic's."""
        own, reads = values[name], [values[read] for read in self.shape.reads[name]]
        return super().loss(name, values) + sum(
            (0.3 * own * read).exp().sum() + 0.2 * (own + read).sin().sum() for read in reads
        )


def _problem_class(quadratics: Quadratics, name: str) -> type[mlo.Problem]:
    """A problem class whose loss has the signature of the shape."""
    reads = quadratics.shape.reads[name]

    def evaluate(self: mlo.Problem, problems: dict[str, mlo.Problem]) -> Tensor:
        return quadratics.loss(name, {read: problem() for read, problem in problems.items()} | {name: self()})

    namespace: dict[str, object] = {"evaluate": evaluate}
    exec(  # the signature declares the graph, so it has to be written out
        f"def loss(self, batch, {', '.join(reads)}):\n"
        f"    return evaluate(self, dict({', '.join(f'{r}={r}' for r in reads)}))",
        namespace,
    )
    return type(f"Quadratic_{name}", (mlo.Problem,), {"loss": namespace["loss"]})
