"""Estimators that take the solution to be one optimizer step away: first order, one step, DARTS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from mlo.hypergradient.estimators.base import AlongSteps, Estimator, Pulled
from mlo.hypergradient.products import Central
from mlo.hypergradient.step import Step
from mlo.levels.problem import Problem
from mlo.ops.vectors import Vector
from mlo.steps.optimizer import check_differentiable


class FirstOrder(Estimator):
    """No estimator: upper problems get the direct term alone (DARTS, first order)."""

    differentiates: ClassVar[bool] = False

    def pull(self, steps: Sequence[Step], cotangent: Vector) -> Pulled:
        """Nothing."""
        return Pulled({})


class OneStep(AlongSteps):
    """The last optimizer step, differentiated; what came before it is held fixed (T1-T2).

    The cotangent goes back through the user's own optimizer, learning rate, momentum and Adam's scaling included, and
    on through the gradient that it stepped with, by one curvature product.
    """

    def pull(self, steps: Sequence[Step], cotangent: Vector) -> Pulled:
        """One optimizer pullback and one product, at the state before the step."""
        step = steps[-1]
        curvature = self.product.at(step.before())
        return Pulled(step.cross_through_optimizer(cotangent, curvature))


class Darts(Estimator):
    """One step by a central difference, with lookahead (DARTS, eqs. 7 and 8; LBT, eqs. 7 to 12).

    The same as ``one_step`` with the product ``central``; the step size of the difference is ``radius`` / |v|.
    """

    needs_before: ClassVar[bool] = True
    lookahead: ClassVar[bool] = True
    radius: float = Field(0.01, gt=0, description="distance of the two points of the difference from the middle")

    def pull(self, steps: Sequence[Step], cotangent: Vector) -> Pulled:
        """See :class:`OneStep`."""
        return OneStep(product=Central(radius=self.radius)).pull(steps, cotangent)

    def check(self, problem: Problem) -> None:
        """See :class:`OneStep`."""
        check_differentiable(problem)


class Sama(Estimator):
    """SAMA (Choe et al. 2023): the inverse Hessian taken for the identity, Adam's scaling kept; 2 passes.

    The cotangent goes through the optimizer's step, and the product is a central difference at the present solution
    rather than before the step.
    """

    needs_before: ClassVar[bool] = True
    radius: float = Field(0.01, gt=0, description="distance of the two points of the difference from the middle")

    def pull(self, steps: Sequence[Step], cotangent: Vector) -> Pulled:
        """One optimizer pullback and one product, at the solution."""
        step = steps[-1]
        product = Central(radius=self.radius)
        direction = step.pull_through_optimizer(cotangent, product.at(step.before())).gradient
        return Pulled(product.at(step.after()).cross(direction))

    def check(self, problem: Problem) -> None:
        """See :class:`OneStep`."""
        check_differentiable(problem)
