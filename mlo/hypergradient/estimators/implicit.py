"""Estimators by the implicit function theorem: the cotangent meets the inverse Hessian at the solution."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pydantic import Field
from torch import Tensor

from mlo.hypergradient.estimators.base import AtSolution, Pulled
from mlo.hypergradient.products import Exact, ProductOption
from mlo.hypergradient.step import Step
from mlo.ops.rng import replay
from mlo.ops.vectors import Vector, add, add_, copied, dot, norm, scaled

MatVec = Callable[[Vector], Vector]


class ConjugateGradient(AtSolution):
    """(H + damping) z = v solved by conjugate gradient, then -H_xt z (iMAML; Rajeswaran et al. 2019).

    H, the Hessian at the present solution, must be positive definite with its damping; iterations stop where it
    shows negative curvature or where the residual reaches the tolerance, and ``residual`` is reported.
    """

    iterations: int = Field(10, ge=1, description="most products with the Hessian")
    tolerance: float = Field(1e-12, ge=0, description="relative residual at which to stop")
    damping: float = Field(0.0, ge=0, description="added to every eigenvalue of the Hessian")
    warm_start: bool = Field(False, description="begin with the solution of the step before")
    product: ProductOption = Field(Exact(), description="how curvature products are taken")

    def pull(self, steps: Sequence[Step], cotangent: Vector) -> Pulled:
        """Up to ``iterations`` products with H_tt, and one with H_xt."""
        curvature = self.product.at(steps[-1].after())

        def matvec(vector: Vector) -> Vector:
            return add(curvature.own(vector), vector, self.damping) if self.damping else curvature.own(vector)

        start = steps[-1].warm if self.warm_start else None
        solution, residual = conjugate_gradient(matvec, cotangent, self.iterations, self.tolerance, start)
        cotangents = curvature.cross(scaled(solution, -1.0))
        return Pulled(cotangents, {"residual": residual}, solution if self.warm_start else None)


class Neumann(AtSolution):
    """The inverse Hessian as rate * sum (I - rate H)^k v over ``terms`` terms, then -H_xt (Lorraine et al. 2020).

    It converges where ``rate`` is below 2 / (largest eigenvalue). From the first term that grows on, terms are left
    out, so that the answer stays finite; ``residual`` is the relative size of the last term.
    """

    terms: int = Field(10, ge=1, description="terms of the series; each after the first takes one product")
    rate: float | None = Field(
        None, gt=0, description="step size of the series; null: the learning rate of its first group"
    )
    warm_start: bool = Field(False, description="begin with the solution of the step before (SOBA, with 1 or 2 terms)")
    product: ProductOption = Field(Exact(), description="how curvature products are taken")

    def pull(self, steps: Sequence[Step], cotangent: Vector) -> Pulled:
        """``terms`` - 1 products with H_tt, and one with H_xt."""
        curvature = self.product.at(steps[-1].after())
        rate = steps[-1].record.problem.optimizer.param_groups[0]["lr"] if self.rate is None else self.rate
        start = steps[-1].warm if self.warm_start else None
        solution, residual = neumann_series(curvature.own, cotangent, self.terms, rate, start)
        cotangents = curvature.cross(scaled(solution, -1.0))
        return Pulled(cotangents, {"residual": residual}, solution if self.warm_start else None)


class Nystrom(AtSolution):
    """The inverse of a low-rank approximation of the Hessian, plus damping (Hataya and Yamada 2023), then -H_xt.

    The Hessian is approximated from its action on ``rank`` random vectors, which the step's own random state gives,
    so the same state gives the same answer. Exact, but for the damping, once ``rank`` is the number of variables.
    """

    rank: int = Field(10, ge=1, description="random vectors, each of which takes one product with the Hessian")
    damping: float = Field(0.01, gt=0, description="added to every eigenvalue of the Hessian")
    product: ProductOption = Field(Exact(), description="how curvature products are taken")

    def pull(self, steps: Sequence[Step], cotangent: Vector) -> Pulled:
        """``rank`` products with H_tt, and one with H_xt."""
        step = steps[-1]
        curvature = self.product.at(step.after())
        device = cotangent[0].device
        rank = min(self.rank, sum(c.numel() for c in cotangent))
        with replay(step.record.micro[0].randomness, device):
            probes = [tuple(torch.randn_like(c) for c in cotangent) for _ in range(rank)]
        solution = nystrom_solve(curvature.own, cotangent, _orthonormal(probes), self.damping)
        residual = add(add(cotangent, curvature.own(solution), -1.0), solution, -self.damping)
        return Pulled(curvature.cross(scaled(solution, -1.0)), {"residual": norm(residual) / norm(cotangent)})


def conjugate_gradient(
    matvec: MatVec, target: Vector, iterations: int, tolerance: float, start: Vector | None = None
) -> tuple[Vector, Tensor]:
    """Solve matvec(z) = target for a positive definite matvec; with z comes |matvec(z) - target| / |target|.

    Whether to go on is decided on the device: nothing waits for a card. Once the residual is within ``tolerance`` or
    a direction of no positive curvature turns up, the answer stays as it is.
    """
    solution = tuple(torch.zeros_like(t) for t in target) if start is None else copied(start)
    direction = target if start is None else add(target, matvec(start), -1.0)
    residual = copied(direction)
    size, whole = dot(residual, residual), dot(target, target)
    active = size > tolerance**2 * whole
    for _ in range(iterations):
        if _over(active):
            break
        image = matvec(direction)
        curvature = dot(direction, image)
        active = active & (curvature > 0)
        stride = torch.where(active, size / torch.where(active, curvature, 1.0), 0.0)
        add_(solution, direction, stride)
        add_(residual, image, -stride)
        previous, size = size, dot(residual, residual)
        active = active & (size > tolerance**2 * whole)
        direction = add(residual, direction, torch.where(previous > 0, size / previous, 0.0))
    return solution, (size / whole.clamp(min=torch.finfo(whole.dtype).tiny)).sqrt()


def neumann_series(
    matvec: MatVec, target: Vector, terms: int, rate: float | Tensor, start: Vector | None = None
) -> tuple[Vector, Tensor]:
    """Rate * sum_{k < terms} (I - rate * matvec)^k target, and the relative size of the last term taken in.

    From a ``start`` the series is of what that leaves, target - matvec(start), and the sum is added to it.
    """
    term = copied(target) if start is None else add(target, matvec(start), -1.0)
    total = copied(term)
    size, whole = norm(term), norm(target)
    active = size > 0
    for _ in range(terms - 1):
        if _over(active):
            break
        add_(term, matvec(term), -rate)
        last, size = size, norm(term)
        active = active & (size <= last)
        if active.device.type == "cpu":
            if active:
                add_(total, term)
        else:
            total = _chosen(active, add(total, term), total)
    solution = scaled(total, rate) if start is None else add(start, total, rate)
    return solution, size / whole.clamp(min=torch.finfo(whole.dtype).tiny)


def nystrom_solve(matvec: MatVec, target: Vector, probes: Sequence[Vector], damping: float) -> Vector:
    """(H_r + damping)^-1 target, with H_r = Y (P'Y)^-1 Y' for probes P and Y = H P, by the Woodbury identity."""
    images = torch.stack([_flat(matvec(probe)) for probe in probes])
    core = torch.stack([_flat(probe) for probe in probes]) @ images.T
    core = (core + core.T) / 2 + damping**-1 * (images @ images.T)
    right = _flat(target)
    weights = torch.linalg.pinv(core, hermitian=True) @ (images @ right)
    return _shaped((right - images.T @ weights / damping) / damping, target)


def _orthonormal(vectors: Sequence[Vector]) -> list[Vector]:
    basis = torch.linalg.qr(torch.stack([_flat(vector) for vector in vectors], dim=1)).Q
    return [_shaped(column, vectors[0]) for column in basis.T]


def _flat(vector: Vector) -> Tensor:
    return torch.cat([part.reshape(-1) for part in vector])


def _shaped(flat: Tensor, like: Vector) -> Vector:
    parts = flat.split([part.numel() for part in like])
    return tuple(part.view_as(shape) for part, shape in zip(parts, like, strict=True))


def _chosen(active: Tensor, one: Vector, other: Vector) -> Vector:
    return tuple(torch.where(active, a, b) for a, b in zip(one, other, strict=True))


def _over(active: Tensor) -> bool:
    """Whether the iteration can stop, where asking costs nothing."""
    return active.device.type == "cpu" and not bool(active)
