"""Curvature products: how u -> (H_tt u, H_xt u) is taken, t a problem's variables and x what its loss reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Protocol

import torch
from pydantic import Field
from torch import Tensor

from mlo.config import Config, Registered
from mlo.hypergradient.step import LocalLoss, cotangents_of
from mlo.registry import PRODUCTS
from mlo.vectors import Vector, add, filled, norm, scaled


class Curvature(Protocol):
    """The second derivatives of one local loss at its point."""

    def own(self, vector: Vector) -> Vector:
        """H_tt u: the Hessian in the problem's own variables."""

    def cross(self, vector: Vector) -> dict[str, Vector | None]:
        """H_xt u for each problem x that the loss reads: the gradient in x of <gradient in t, u>."""


class Product(Config, ABC):
    """A way of taking curvature products; a subclass has its options, and opens a :class:`Curvature`."""

    @abstractmethod
    def at(self, loss: LocalLoss) -> Curvature:
        """The curvature of ``loss`` at its point."""


class Exact(Product):
    """Double backward: exact; one forward, its gradient's graph kept for all products (about 3 passes for one)."""

    def at(self, loss: LocalLoss) -> Curvature:
        """See :class:`Product`."""
        return _ExactCurvature(loss)


class Central(Product):
    """Central difference of two gradients (DARTS, eqs. 8): 2 passes; no second derivative, but blind to kinks.

    The two points lie at ``radius`` (in the Euclidean norm of all variables) on either side, which is the paper's
    epsilon = 0.01 / |v| at the default.
    """

    radius: float = Field(0.01, gt=0, description="distance of the two points from the middle, a Euclidean norm")

    def at(self, loss: LocalLoss) -> Curvature:
        """See :class:`Product`."""
        return _CentralCurvature(loss, self.radius)


ProductOption = Annotated[Product, Registered(PRODUCTS)]


class _ExactCurvature:
    def __init__(self, loss: LocalLoss) -> None:
        self._loss = loss
        with torch.enable_grad():
            value = loss(loss.point)
            gradient = torch.autograd.grad(value, loss.point, create_graph=True, allow_unused=True)
        self._gradient = [g for g in gradient if g is not None and g.requires_grad]
        self._kept = [g is not None and g.requires_grad for g in gradient]

    def own(self, vector: Vector) -> Vector:
        return filled(self._transposed(vector, list(self._loss.point)), self._loss.point)

    def cross(self, vector: Vector) -> dict[str, Vector | None]:
        inputs = self._loss.inputs()
        return self._loss.pull(cotangents_of(inputs, self._transposed(vector, inputs)))

    def _transposed(self, vector: Vector, inputs: list[Tensor]) -> list[Tensor | None]:
        given = [u for u, kept in zip(vector, self._kept, strict=True) if kept]
        if not given or not inputs:
            return [None] * len(inputs)
        return list(torch.autograd.grad(self._gradient, inputs, given, retain_graph=True, allow_unused=True))


class _CentralCurvature:
    def __init__(self, loss: LocalLoss, radius: float) -> None:
        self._loss = loss
        self._radius = radius

    def own(self, vector: Vector) -> Vector:
        size, (ahead, behind) = self._points(vector)
        gradients = []
        for point in (ahead, behind):
            found = torch.autograd.grad(self._loss(point), point, allow_unused=True)
            gradients.append(filled(found, point))
        return scaled(add(gradients[0], gradients[1], -1.0), size / (2 * self._radius))

    def cross(self, vector: Vector) -> dict[str, Vector | None]:
        size, points = self._points(vector)
        difference: dict[Tensor, Tensor] = {}
        for sign, point in zip((1.0, -1.0), points, strict=True):
            value = self._loss(point)
            inputs = self._loss.inputs()
            gradients = torch.autograd.grad(value, inputs, allow_unused=True) if inputs else ()
            for key, gradient in zip(inputs, gradients, strict=True):
                if gradient is not None:
                    term = gradient * (sign * size / (2 * self._radius)).to(gradient.dtype)
                    difference[key] = difference[key] + term if key in difference else term
        return self._loss.pull(difference)

    def _points(self, vector: Vector) -> tuple[Tensor, tuple[Vector, Vector]]:
        """|u|, and the variables moved by the radius along u either way."""
        size = norm(vector)
        stride = self._radius / size.clamp(min=torch.finfo(size.dtype).tiny)
        with torch.no_grad():
            either = tuple(add(self._loss.point, vector, sign * stride) for sign in (1.0, -1.0))
        ahead, behind = (tuple(p.requires_grad_() for p in point) for point in either)
        return size, (ahead, behind)
