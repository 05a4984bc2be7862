"""Estimators based on the implicit function theorem: conjugate gradient, Neumann series and Nyström.

At a minimum t*(x) of the lower loss L(t, x), dt*/dx = -H_tt^-1 H_tx. So a cotangent v is pulled back to -H_xt z, where
z solves H_tt z = v. The estimators differ in how they solve this system (:mod:`mlo.hypergradient.solvers`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from mlo.hypergradient.curvature_products import Exact, ProductOption
from mlo.hypergradient.estimators.base import AtSolution, Pulled
from mlo.hypergradient.solvers import conjugate_gradient, neumann_series, nystrom
from mlo.hypergradient.step import Step
from mlo.ops.rng import replay
from mlo.ops.vectors import Vector, add, scaled


class ConjugateGradient(AtSolution):
    """(H + damping) z = v solved by conjugate gradient, then -H_xt z (iMAML; Rajeswaran et al. 2019).

    H + damping, with the Hessian H at the current solution, must be positive definite. The iteration stops at the
    tolerance or at a direction of negative curvature. The relative residual is reported as the metric ``residual``.
    """

    iterations: int = Field(10, ge=1, description="maximum number of products with the Hessian")
    tolerance: float = Field(1e-12, ge=0, description="relative residual at which to stop")
    damping: float = Field(0.0, ge=0, description="added to every eigenvalue of the Hessian")
    warm_start: bool = Field(False, description="start from the solution of the previous step")
    product: ProductOption = Field(Exact(), description="how curvature products are computed")

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

    The series converges if ``rate`` is below 2 / (largest eigenvalue). From the first term that grows on, terms are
    left out, so that the result stays finite. The relative size of the last term is reported as ``residual``.
    """

    terms: int = Field(10, ge=1, description="terms of the series; each after the first takes one product")
    rate: float | None = Field(
        None, gt=0, description="step size of the series; null: the learning rate of the first parameter group"
    )
    warm_start: bool = Field(
        False, description="start from the solution of the previous step (SOBA, with 1 or 2 terms)"
    )
    product: ProductOption = Field(Exact(), description="how curvature products are computed")

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

    The Hessian is approximated from its products with ``rank`` random vectors. They are drawn from the random state of
    the step, so that the result is reproducible. If ``rank`` is the number of variables, it is exact up to the damping.
    The relative residual is reported as ``residual``.
    """

    rank: int = Field(10, ge=1, description="random vectors, each of which takes one product with the Hessian")
    damping: float = Field(0.01, gt=0, description="added to every eigenvalue of the Hessian")
    product: ProductOption = Field(Exact(), description="how curvature products are computed")

    def pull(self, steps: Sequence[Step], cotangent: Vector) -> Pulled:
        """``rank`` + 1 products with H_tt, and one with H_xt."""
        step = steps[-1]
        curvature = self.product.at(step.after())
        device = cotangent[0].device
        rank = min(self.rank, sum(c.numel() for c in cotangent))
        with replay(step.record.micro[0].randomness, device):
            probes = [tuple(torch.randn_like(c) for c in cotangent) for _ in range(rank)]
        solution, residual = nystrom(curvature.own, cotangent, probes, self.damping)
        return Pulled(curvature.cross(scaled(solution, -1.0)), {"residual": residual})
