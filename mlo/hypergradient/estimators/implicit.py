"""Estimators based on the implicit function theorem: conjugate gradient, Neumann series and Nyström.

At a minimum t*(x) of the lower loss L(t, x), dt*/dx = -H_tt^-1 H_tx. So a cotangent v is pulled back to -H_xt z, where
z solves H_tt z = v. The estimators differ in how they solve this system (:mod:`mlo.hypergradient.solvers`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mlo.hypergradient.estimators.base import Estimator, Pulled, Recording
from mlo.hypergradient.products import Exact, ProductOption
from mlo.hypergradient.solvers import MatVec, conjugate_gradient, minimal_residual, neumann_series, nystrom
from mlo.ops.rng import replay
from mlo.ops.vectors import Vector, add, as_like, real, scaled
from mlo.steps.step import Step

#: (u -> H_tt u, v) -> (z with H_tt z = v, its relative residual)
Solver = Callable[[MatVec, Vector], tuple[Vector, Tensor]]


class Implicit(Estimator, ABC):
    """-H_xt z, where z solves H_tt z = v; subclasses choose the solver."""

    fresh_batch: bool = Field(
        False, description="compute curvature on the problem's next batch instead of the batch of its last step"
    )
    product: ProductOption = Field(Exact(), description="how curvature products are computed")

    @property
    def recording(self) -> Recording:
        """The last step, and the next batches by option."""
        return Recording(fresh=self.fresh_batch)

    def pull(self, steps: Sequence[Step], cotangent: Vector, targets: Sequence[str], warm: Vector | None) -> Pulled:
        """The products of the solver with H_tt, and one with H_xt."""
        curvature = self.product.after(steps[-1], targets)
        start = warm if self.warms else None
        solution, residual = self.solver(steps[-1], start)(lambda u: curvature(u, cross=False)[0], cotangent)
        cross = curvature(scaled(solution, -1.0), own=False)[1]
        return Pulled(cross, {"residual": residual}, solution if self.warms else None)

    @abstractmethod
    def solver(self, step: Step, start: Vector | None) -> Solver:
        """The solver for the curvature at the solution after ``step``, which begins at ``start`` (None: zero)."""

    @property
    def warms(self) -> bool:
        """Whether the next solver begins at this solution."""
        return False


class ConjugateGradient(Implicit):
    """(H + damping) z = v solved by conjugate gradient, then -H_xt z (iMAML; Rajeswaran et al. 2019).

    H + damping, with the Hessian H at the current solution, must be positive definite. The iteration stops at the
    tolerance or at a direction of negative curvature. The relative residual is reported as the metric ``residual``.
    """

    remedy: ClassVar[str] = (
        "raise iterations, as in {'kind': 'cg', 'iterations': 100}, or train the lower problem closer to its minimum"
    )
    iterations: int = Field(20, ge=1, description="maximum number of products with the Hessian")
    tolerance: float = Field(1e-12, ge=0, description="relative residual at which to stop")
    damping: float = Field(0.0, ge=0, description="added to every eigenvalue of the Hessian")
    warm_start: bool = Field(False, description="start from the solution of the previous step")

    @property
    def warms(self) -> bool:
        """The option ``warm_start``."""
        return self.warm_start

    def solver(self, step: Step, start: Vector | None) -> Solver:
        """Up to ``iterations`` products."""

        def solve(matvec: MatVec, b: Vector) -> tuple[Vector, Tensor]:
            def damped(u: Vector) -> Vector:
                return add(matvec(u), u, self.damping) if self.damping else matvec(u)

            return conjugate_gradient(damped, b, self.iterations, self.tolerance, start)

        return solve


class Neumann(Implicit):
    """The inverse Hessian as rate * sum (I - rate H)^k v over ``terms`` terms, then -H_xt (Lorraine et al. 2020).

    By default each term has the rate that makes the residual smallest, so that there is nothing to tune, and it cannot
    diverge. With a fixed ``rate``, such as the learning rate in the paper, the series converges if that is below
    2 / (largest eigenvalue); from the first term that grows on, terms are left out, so that the result stays finite.
    The relative residual is reported as ``residual``; with a fixed rate, it is that before the last term.
    """

    remedy: ClassVar[str] = (
        "raise terms, as in {'kind': 'neumann', 'terms': 100}, leave out rate (or lower it), or use 'cg'"
    )
    terms: int = Field(20, ge=1, description="terms of the series; each takes one product, with a fixed rate one less")
    rate: float | None = Field(None, gt=0, description="step size of the series; null: the best for each term")
    warm_start: bool = Field(
        False, description="start from the solution of the previous step (SOBA, with 1 or 2 terms)"
    )

    @property
    def warms(self) -> bool:
        """The option ``warm_start``."""
        return self.warm_start

    def solver(self, step: Step, start: Vector | None) -> Solver:
        """``terms`` products, or one less."""
        rate = self.rate
        if rate is None:
            return lambda matvec, b: minimal_residual(matvec, b, self.terms, start)
        return lambda matvec, b: neumann_series(matvec, b, self.terms, rate, start)


class Nystrom(Implicit):
    """The inverse of a low-rank approximation of the Hessian, plus damping (Hataya and Yamada 2023), then -H_xt.

    The Hessian is approximated from its products with ``rank`` random vectors. They are drawn from the random state of
    the step, so that the result is reproducible. If ``rank`` is the number of variables, it is exact up to the damping.
    The relative residual is reported as ``residual``.
    """

    remedy: ClassVar[str] = "raise rank, as in {'kind': 'nystrom', 'rank': 50}, or use 'cg'"
    rank: int = Field(10, ge=1, description="random vectors, each of which takes one product with the Hessian")
    damping: float | None = Field(
        None,
        gt=0,
        description="added to every eigenvalue of the Hessian; null: nothing, but directions that the approximation "
        "lacks count as its smallest eigenvalue",
    )

    def solver(self, step: Step, start: Vector | None) -> Solver:
        """``rank`` + 1 products."""

        def solve(matvec: MatVec, b: Vector) -> tuple[Vector, Tensor]:
            rank = min(self.rank, sum(real(part).numel() for part in b))
            with replay(step.point.micro[0].randomness, b[0].device):
                probes = [tuple([as_like(part, torch.randn_like(real(part))) for part in b]) for _ in range(rank)]
            return nystrom(matvec, b, probes, self.damping)

        return solve
