"""Estimators that differentiate only the last optimizer step: one step, DARTS and SAMA; and first order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from mlo.hypergradient.estimators.base import Estimator, Pulled, Recording
from mlo.hypergradient.estimators.unrolled import AlongSteps
from mlo.hypergradient.products import Central
from mlo.levels.problem import Problem
from mlo.ops.vectors import Vector
from mlo.steps.step import Step
from mlo.steps.trials import check_differentiable


class FirstOrder(Estimator):
    """Nothing is pulled back: upper problems use only the direct gradient of their loss (first-order DARTS)."""

    differentiates: ClassVar[bool] = False

    def pull(self, steps: Sequence[Step], cotangent: Vector, targets: Sequence[str], warm: Vector | None) -> Pulled:
        """Returns no cotangents."""
        return Pulled({})


class OneStep(AlongSteps):
    """The derivative of the last optimizer step; everything before it is held fixed (T1-T2; Luketina et al. 2016).

    The cotangent is pulled back through the user's own optimizer, including learning rate, momentum and Adam's scaling,
    and then through the gradient of that step, by one curvature product at the state before the step.
    """


class Darts(Estimator):
    """One step, with a central difference and lookahead (DARTS, Liu et al. 2019, eqs. 7 and 8; LBT, eqs. 7 to 12).

    The same as ``one_step`` with the product ``central``. The step size of the difference is ``radius`` / |v|.
    """

    lookahead: ClassVar[bool] = True
    radius: float = Field(0.01, gt=0, description="distance of the two points of the difference from the middle")

    @property
    def recording(self) -> Recording:
        """As of ``one_step`` with that product."""
        return self._one_step().recording

    def pull(self, steps: Sequence[Step], cotangent: Vector, targets: Sequence[str], warm: Vector | None) -> Pulled:
        """See :class:`OneStep`."""
        return self._one_step().pull(steps, cotangent, targets, warm)

    def check(self, problem: Problem) -> None:
        """Raise a ConfigError if a step of the problem's optimizer is not differentiable."""
        check_differentiable(problem)

    def _one_step(self) -> OneStep:
        return OneStep(product=Central(radius=self.radius))


class Sama(Estimator):
    """SAMA (Choe et al. 2023): the identity replaces the inverse Hessian, but Adam's scaling is kept; 2 passes.

    The cotangent is pulled back through the optimizer's step. The product is a central difference at the current
    solution, not at the state before the step.
    """

    radius: float = Field(0.01, gt=0, description="distance of the two points of the difference from the middle")

    @property
    def recording(self) -> Recording:
        """The last step, and the state before it."""
        return Recording(before=True)

    def pull(self, steps: Sequence[Step], cotangent: Vector, targets: Sequence[str], warm: Vector | None) -> Pulled:
        """One pullback through the optimizer, and one product at the solution."""
        direction = steps[-1].transpose(cotangent).gradient
        return Pulled(Central(radius=self.radius).after(steps[-1], targets)(direction, own=False)[1])

    def check(self, problem: Problem) -> None:
        """Raise a ConfigError if a step of the problem's optimizer is not differentiable."""
        check_differentiable(problem)
