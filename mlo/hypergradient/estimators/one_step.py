"""Estimators that differentiate only the last optimizer step: one step, DARTS and SAMA; and first order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from mlo.hypergradient.curvature_products import Central
from mlo.hypergradient.estimators.base import AlongSteps, Estimator, Pulled
from mlo.hypergradient.step import Step
from mlo.levels.problem import Problem
from mlo.ops.vectors import Vector
from mlo.steps.optimizer import check_differentiable


class FirstOrder(Estimator):
    """Nothing is pulled back: upper problems use only the direct gradient of their loss (first-order DARTS)."""

    differentiates: ClassVar[bool] = False

    def pull(self, steps: Sequence[Step], cotangent: Vector) -> Pulled:
        """Returns no cotangents."""
        return Pulled({})


class OneStep(AlongSteps):
    """The derivative of the last optimizer step; everything before it is held fixed (T1-T2; Luketina et al. 2016).

    The cotangent is pulled back through the user's own optimizer, including learning rate, momentum and Adam's scaling,
    and then through the gradient of that step, by one curvature product.
    """

    def pull(self, steps: Sequence[Step], cotangent: Vector) -> Pulled:
        """One pullback through the optimizer and one product, at the state before the step."""
        step = steps[-1]
        curvature = self.product.at(step.before())
        return Pulled(step.cross_through_optimizer(cotangent, curvature))


class Darts(Estimator):
    """One step, with a central difference and lookahead (DARTS, Liu et al. 2019, eqs. 7 and 8; LBT, eqs. 7 to 12).

    The same as ``one_step`` with the product ``central``. The step size of the difference is ``radius`` / |v|.
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
    """SAMA (Choe et al. 2023): the identity replaces the inverse Hessian, but Adam's scaling is kept; 2 passes.

    The cotangent is pulled back through the optimizer's step. The product is a central difference at the current
    solution, not at the state before the step.
    """

    needs_before: ClassVar[bool] = True
    radius: float = Field(0.01, gt=0, description="distance of the two points of the difference from the middle")

    def pull(self, steps: Sequence[Step], cotangent: Vector) -> Pulled:
        """One pullback through the optimizer, and one product at the solution."""
        step = steps[-1]
        product = Central(radius=self.radius)
        direction = step.pull_through_optimizer(cotangent, product.at(step.before())).gradient
        return Pulled(product.at(step.after()).cross(direction))

    def check(self, problem: Problem) -> None:
        """See :class:`OneStep`."""
        check_differentiable(problem)
