"""The penalty estimator: a few gradient steps on the loss plus a small linear term, without second derivatives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from mlo.hypergradient.estimators.base import AtSolution, Pulled
from mlo.hypergradient.step import LocalLoss, Step
from mlo.levels.read_cache import add_to
from mlo.ops.vectors import Vector, add, norm


class Penalty(AtSolution):
    """The difference of the loss's gradient between two minima, of the loss plus and minus a small linear term.

    Let t(d) be the minimum of L(t, x) + d <v, t> for the cotangent v. The result is the derivative, with respect to d,
    of the gradient of L(t(d), x) in x, computed as a difference. Each minimum is approximated by ``steps`` gradient
    steps from the current solution (similar to F2SA; Kwon et al. 2023). It costs 2 (``steps`` + 1) passes.
    """

    steps: int = Field(10, ge=1, description="gradient steps towards each of the two minima")
    rate: float | None = Field(None, gt=0, description="step size of these steps; null: the problem's learning rate")
    tilt: float = Field(0.01, gt=0, description="Euclidean norm of the linear term's gradient")

    def pull(self, steps: Sequence[Step], cotangent: Vector) -> Pulled:
        """2 (``steps`` + 1) gradients of the loss."""
        loss = steps[-1].after()
        rate = steps[-1].record.problem.optimizer.param_groups[0]["lr"] if self.rate is None else self.rate
        size = norm(cotangent)
        tilt = self.tilt / torch.where(size > 0, size, 1.0)
        difference: dict[torch.Tensor, torch.Tensor] = {}
        for sign in (1.0, -1.0):
            reached = self._descend(loss, cotangent, sign * tilt, rate)
            inputs = loss.gradients(reached, own=False)[1]
            weight = sign / (2 * tilt)
            add_to(difference, list(inputs), [weight * gradient for gradient in inputs.values()])
        return Pulled(loss.pull(difference))

    def _descend(self, loss: LocalLoss, cotangent: Vector, tilt: torch.Tensor, rate: float | torch.Tensor) -> Vector:
        point = loss.point
        for _ in range(self.steps):
            gradient = loss.gradients(point, inputs=False)[0]
            with torch.no_grad():
                point = tuple(p.requires_grad_() for p in add(point, add(gradient, cotangent, tilt), -rate))
        return point
