"""An estimator without second derivatives: a few steps on the loss with a small linear tilt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from mlo.hypergradient.estimators.base import AtSolution, Pulled
from mlo.hypergradient.step import LocalLoss, Step
from mlo.levels.read_cache import add_to
from mlo.ops.vectors import Vector, add, norm


class Penalty(AtSolution):
    """The change of the loss's gradient between minima under two opposite small tilts; first order only.

    With t(d) the minimum of L(t, x) + d <v, t>, the estimator is d/dd of the gradient of L(t(d), x) in x, taken as a
    difference; each minimum is approached by ``steps`` gradient steps from the present solution (in the manner of
    F2SA, Kwon et al. 2023). It costs 2 (``steps`` + 1) passes.
    """

    steps: int = Field(10, ge=1, description="gradient steps towards each tilted minimum")
    rate: float | None = Field(None, gt=0, description="their step size; null: the problem's learning rate")
    tilt: float = Field(0.01, gt=0, description="Euclidean norm of the tilt, the gradient's change")

    def pull(self, steps: Sequence[Step], cotangent: Vector) -> Pulled:
        """See the class."""
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
