"""The penalty estimator: a few gradient steps on the loss plus a small linear term, without second derivatives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from mlo.hypergradient.estimators.base import Estimator, Pulled, Recording
from mlo.hypergradient.products import slope
from mlo.levels.read_cache import ReadCache
from mlo.ops.vectors import Vector, add, filled, norm
from mlo.steps.point import Point, Wanted, gradient
from mlo.steps.step import Step


class Penalty(Estimator):
    """The difference of the loss's gradient between two minima, of the loss plus and minus a small linear term.

    Let t(d) be the minimum of L(t, x) + d <v, t> for the cotangent v. The result is the derivative, with respect to d,
    of the gradient of L(t(d), x) in x, computed as a difference. Each minimum is approximated by ``steps`` gradient
    steps from the current solution (similar to F2SA; Kwon et al. 2023). It costs 2 (``steps`` + 1) passes.
    """

    steps: int = Field(10, ge=1, description="gradient steps towards each of the two minima")
    rate: float | None = Field(None, gt=0, description="step size of these steps; null: the problem's learning rate")
    tilt: float = Field(0.01, gt=0, description="Euclidean norm of the linear term's gradient")

    fresh_batch: bool = Field(
        False, description="compute curvature on the problem's next batch instead of the batch of its last step"
    )

    @property
    def recording(self) -> Recording:
        """The last step, and the next batches by option."""
        return Recording(fresh=self.fresh_batch)

    def pull(self, steps: Sequence[Step], cotangent: Vector, targets: Sequence[str], warm: Vector | None) -> Pulled:
        """2 (``steps`` + 1) gradients of the loss."""
        point = steps[-1].at_solution()._replace(autocast=False, cache=ReadCache(cotangent[0].device))
        rate = point.level.problem.optimizer.param_groups[0]["lr"] if self.rate is None else self.rate
        size = norm(cotangent)
        tilt = self.tilt / torch.where(size > 0, size, 1.0)
        wanted = Wanted(targets, reached=targets, at_leaves=True)
        one, other = (
            gradient(self._descend(point, cotangent, sign * tilt, rate, targets), wanted) for sign in (1.0, -1.0)
        )
        return Pulled(slope(point, one, other, False, targets, 1 / (2 * tilt))[1])

    def _descend(
        self, point: Point, cotangent: Vector, tilt: Tensor, rate: float | Tensor, targets: Sequence[str]
    ) -> Point:
        name = point.level.name
        at = point.at(tuple([v.detach().requires_grad_() for v in point.state.variables]))
        for _ in range(self.steps):
            found = gradient(at, Wanted((name,), reached=targets)).found[name]
            with torch.no_grad():
                along = add(filled(found, cotangent), cotangent, tilt)
                at = at.at(tuple([p.requires_grad_() for p in add(at.state.variables, along, -rate)]))
        return at
