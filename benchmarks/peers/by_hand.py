"""Hand-written loops of the two-level workloads, in plain PyTorch, as a careful researcher would write them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.catalogue import ITERATIONS
from benchmarks.peers.workloads import RADIUS, Batch, Bilevel

Vector = Sequence[Tensor]


def mlp(parameters: Vector, images: Tensor) -> Tensor:
    """The forward pass of the model, written out."""
    first, first_bias, second, second_bias = parameters
    return F.linear(F.relu(F.linear(images, first, first_bias)), second, second_bias)


def leaves(parameters: Vector) -> list[Tensor]:
    """Detached copies that require gradients."""
    return [p.detach().clone().requires_grad_() for p in parameters]


def combined(a: Vector, b: Vector, scale: float) -> list[Tensor]:
    """Return ``a + scale * b``."""
    return [x.add(y, alpha=scale) for x, y in zip(a, b, strict=True)]


def dot(a: Vector, b: Vector) -> float:
    """The inner product."""
    return sum(torch.dot(x.flatten(), y.flatten()).item() for x, y in zip(a, b, strict=True))


class Cleaning:
    """Hyper-cleaning: the hypergradient of the sample weights after T steps of SGD, always from the same start."""

    def __init__(self, task: Bilevel, estimator: str) -> None:
        self._task = task
        self._start = [p.detach() for p in task.model.parameters()]
        self._hyper = list(task.weights.parameters())
        methods = {"unrolled": self._unrolled, "kept": self._unrolled, "recomputed": self._recomputed}
        self._compute = (methods | {"product": self._product}).get(estimator) or self._implicit
        self._solve = {"cg": conjugate_gradient, "neumann": neumann}.get(estimator)

    def gradient(self) -> list[Tensor]:
        """The hypergradient."""
        return self._compute()

    def round(self) -> None:
        """One round, which is timed."""
        self._compute()

    def _lower(self, p: Vector) -> Tensor:
        return self._task.lower_loss(lambda x: mlp(p, x), self._task.weights, p, self._task.lower[0])

    def _upper(self, p: Vector) -> Tensor:
        return self._task.upper_loss(lambda x: mlp(p, x), self._task.upper[0])

    def _unrolled(self) -> list[Tensor]:
        p: Vector = leaves(self._start)
        for _ in range(self._task.steps):
            p = combined(p, torch.autograd.grad(self._lower(p), p, create_graph=True), -self._task.lr)
        return list(torch.autograd.grad(self._upper(p), self._hyper))

    def _recomputed(self) -> list[Tensor]:
        lr, passed = self._task.lr, []
        p = leaves(self._start)
        for _ in range(self._task.steps):
            passed.append(p)
            g = torch.autograd.grad(self._lower(p), p)
            p = leaves(combined([x.detach() for x in p], g, -lr))
        v = torch.autograd.grad(self._upper(p), p)
        total = [torch.zeros_like(h) for h in self._hyper]
        while passed:
            p = passed.pop()
            g = torch.autograd.grad(self._lower(p), p, create_graph=True)
            found = torch.autograd.grad(g, [*p, *self._hyper] if passed else self._hyper, v)
            total = combined(total, found[-len(total) :], -lr)
            v = combined(v, found[: len(p)], -lr) if passed else v
        return total

    def _product(self) -> list[Tensor]:
        """The curvature product of the lower loss at the start, with the vector :meth:`Bilevel.direction`."""
        p = leaves(self._start)
        v = self._task.direction(p)
        g = torch.autograd.grad(self._lower(p), p, create_graph=True)
        return list(torch.autograd.grad(g, [*p, *self._hyper], v))

    def _implicit(self) -> list[Tensor]:
        p = leaves(self._start)
        for _ in range(self._task.steps):
            g = torch.autograd.grad(self._lower(p), p)
            with torch.no_grad():
                torch._foreach_add_(p, g, alpha=-self._task.lr)
        v = torch.autograd.grad(self._upper(p), p)
        return implicit(self._lower(p), p, self._hyper, v, self._solve, self._task.lr)


class Reweighting:
    """Meta-weight-net: one SGD step of the model with momentum, then one Adam step of the weight net."""

    def __init__(self, task: Bilevel, estimator: str) -> None:
        self._task = task
        self._estimator = estimator
        self._hyper = list(task.weights.parameters())
        self._optimizer = torch.optim.Adam(self._hyper, lr=task.upper_lr)
        self._p = leaves(list(task.model.parameters()))
        self._buffers: list[Tensor] | None = None
        self._batches = zip(itertools.cycle(task.lower), itertools.cycle(task.upper), strict=False)
        self._solve = {"cg": conjugate_gradient, "neumann": neumann}.get(estimator)

    def round(self) -> None:
        """One round, which is timed."""
        self.gradient()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def gradient(self) -> list[Tensor]:
        """Take the model's next step, and return the hypergradient after it."""
        lower, upper = next(self._batches)
        one_step = self._estimator == "one_step"
        before = leaves(self._p) if one_step else self._p
        g = torch.autograd.grad(self._lower(before, lower), before, create_graph=one_step)
        buffers = g if self._buffers is None else combined(g, self._buffers, self._task.momentum)
        after = combined(before if one_step else [p.detach() for p in before], buffers, -self._task.lr)
        self._buffers = [b.detach() for b in buffers]
        self._p = [p.detach().requires_grad_() for p in after]
        if one_step:
            found = torch.autograd.grad(self._upper(after, upper), self._hyper)
        else:
            v = torch.autograd.grad(self._upper(self._p, upper), self._p)
            if self._solve is None:
                found = self._difference(before, v, lower)
            else:
                found = implicit(self._lower(self._p, lower), self._p, self._hyper, v, self._solve, self._task.lr)
        for parameter, gradient in zip(self._hyper, found, strict=True):
            parameter.grad = gradient
        return list(found)

    def _difference(self, before: Vector, v: Vector, batch: Batch) -> list[Tensor]:
        """DARTS, equations 7 and 8: -lr times a curvature product, by a central difference."""
        size = dot(v, v) ** 0.5
        with torch.no_grad():
            above, below = ([p.requires_grad_() for p in combined(before, v, s * RADIUS / size)] for s in (1.0, -1.0))
        scale = -self._task.lr * size / (2 * RADIUS)
        found = [torch.autograd.grad(self._lower(p, batch), self._hyper) for p in (above, below)]
        return [scale * (a - b) for a, b in zip(*found, strict=True)]

    def _lower(self, p: Vector, batch: Batch) -> Tensor:
        return self._task.lower_loss(lambda x: mlp(p, x), self._task.weights, p, batch)

    def _upper(self, p: Vector, batch: Batch) -> Tensor:
        return self._task.upper_loss(lambda x: mlp(p, x), batch)


Solver = Callable[[Callable[[Vector], Vector], Vector, float], Vector]


def implicit(loss: Tensor, p: Vector, hyper: Vector, v: Vector, solve: Solver, lr: float) -> list[Tensor]:
    """The implicit function theorem, with a graph of the gradient that all products share."""
    g = torch.autograd.grad(loss, p, create_graph=True)
    z = solve(lambda u: torch.autograd.grad(g, p, u, retain_graph=True), v, lr)
    return [-x for x in torch.autograd.grad(g, hyper, z)]


def conjugate_gradient(
    matvec: Callable[[Vector], Vector], v: Vector, lr: float, iterations: int = ITERATIONS
) -> Vector:
    """Solve by a number of iterations of conjugate gradient."""
    z: Vector = [torch.zeros_like(x) for x in v]
    r = d = v
    size = dot(r, r)
    for _ in range(iterations):
        image = matvec(d)
        stride = size / dot(d, image)
        z, r = combined(z, d, stride), combined(r, image, -stride)
        size, last = dot(r, r), size
        d = combined(r, d, size / last)
    return z


def neumann(matvec: Callable[[Vector], Vector], v: Vector, lr: float) -> Vector:
    """Approximate the solution by ten terms of the Neumann series."""
    total = term = v
    for _ in range(ITERATIONS - 1):
        term = combined(term, matvec(term), -lr)
        total = combined(total, term, 1.0)
    return [lr * x for x in total]
