"""Curvature products: how u -> (H_tt u, H_xt u) is taken, t a problem's variables and x what its loss reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd import forward_ad

from mlo.hypergradient.step import Cotangents, Curvature, LocalLoss, cotangents_of
from mlo.ops.differentiable import twice_differentiable
from mlo.ops.vectors import Vector, add, filled, norm, scaled
from mlo.options.config import Config, Registered
from mlo.options.registry import PRODUCTS


class Product(Config, ABC):
    """A way of taking curvature products; a subclass has its options, and opens a :class:`Curvature`."""

    needs_base: ClassVar[bool] = False  # whether the step should keep its gradients for what it reads
    keeps_graph: ClassVar[bool] = False  # whether it should keep its gradient's graph
    autocast: bool = Field(False, description="under the problem's autocast, as its steps are, rather than without")

    def at(self, loss: LocalLoss) -> Curvature:
        """The curvature of ``loss`` at its point."""
        loss = loss.under_autocast() if self.autocast else loss
        return self.open(loss) if loss.alone else _MeanCurvature(loss, self.open)

    @abstractmethod
    def open(self, loss: LocalLoss) -> Curvature:
        """The curvature of ``loss``, which is in the precision asked for."""


class Exact(Product):
    """Double backward: exact; one forward, its gradient's graph kept for all products (about 3 passes for one)."""

    keeps_graph: ClassVar[bool] = True

    def open(self, loss: LocalLoss) -> Curvature:
        """See :class:`Product`."""
        return _ExactCurvature(loss)


class Forward(Product):
    """Forward over reverse: exact, with the memory of one backward; 1 pass with tangents for each product.

    Not everywhere a gain (on a CPU it is slower than ``exact`` for small models), and operators without a forward
    derivative, fused attention among them, refuse it.
    """

    def open(self, loss: LocalLoss) -> Curvature:
        """See :class:`Product`."""
        return _Directional(loss, _tangents)


class Central(Product):
    """Central difference of two gradients (DARTS, eq. 8): 2 passes; no second derivative, but blind to kinks.

    The two points lie at ``radius`` (in the Euclidean norm of all variables) on either side, which is the paper's
    epsilon = 0.01 / |v| at the default.
    """

    radius: float = Field(0.01, gt=0, description="distance of the two points from the middle, a Euclidean norm")

    def open(self, loss: LocalLoss) -> Curvature:
        """See :class:`Product`."""
        return _Directional(loss, partial(_difference, radius=self.radius, signs=(1.0, -1.0)))


class OneSided(Product):
    """Forward difference against the gradient at the point itself: 1 pass for each product.

    That gradient is the real step's own where products are taken before the step, and one more pass elsewhere. Of
    first order in ``radius`` where ``central`` is of second.
    """

    needs_base: ClassVar[bool] = True
    radius: float = Field(0.01, gt=0, description="distance of the other point, a Euclidean norm")

    def open(self, loss: LocalLoss) -> Curvature:
        """See :class:`Product`."""
        return _Directional(loss, partial(_difference, radius=self.radius, signs=(1.0,), base=loss.base()))


ProductOption = Annotated[Product, Registered(PRODUCTS)]


class _MeanCurvature:
    """Over several micro-batches: each is opened for each product, so that one's memory is held at a time."""

    def __init__(self, loss: LocalLoss, open_part: Callable[[LocalLoss], Curvature]) -> None:
        self._loss = loss
        self._open = open_part

    def gradient(self) -> Vector:
        return self._loss.gradient()

    def own(self, vector: Vector) -> Vector:
        return self._mean(self._open(part).own(vector) for part in self._loss.parts())

    def cross(self, vector: Vector) -> Cotangents:
        return self._means(((), self._open(part).cross(vector)) for part in self._loss.parts())[1]

    def both(self, vector: Vector) -> tuple[Vector, Cotangents]:
        return self._means(self._open(part).both(vector) for part in self._loss.parts())

    def _mean(self, vectors: Iterable[Vector]) -> Vector:
        return scaled(reduce(add, vectors), 1 / self._loss.count)

    def _means(self, found: Iterable[tuple[Vector, Cotangents]]) -> tuple[Vector, Cotangents]:
        own: Vector = ()
        cross: Cotangents = {}
        for part, others in found:
            own = add(own, part) if own else part
            for target, other in others.items():
                so_far = cross.get(target)
                cross[target] = other if so_far is None else so_far if other is None else add(so_far, other)
        share = 1 / self._loss.count
        return scaled(own, share), {t: None if c is None else scaled(c, share) for t, c in cross.items()}


class _ExactCurvature:
    def __init__(self, loss: LocalLoss) -> None:
        self._loss = loss
        self._graph = loss.graph
        self._used = False

    def gradient(self) -> Vector:
        return tuple(g.detach() for g in self._kept()[1])

    def own(self, vector: Vector) -> Vector:
        return self._product(vector, own=True, inputs=False)[0]

    def cross(self, vector: Vector) -> Cotangents:
        return self._loss.pull(self._product(vector, own=False, inputs=True)[1])

    def both(self, vector: Vector) -> tuple[Vector, Cotangents]:
        own, inputs = self._product(vector, own=True, inputs=True)
        return own, self._loss.pull(inputs)

    def _kept(self) -> tuple[Vector, Vector]:
        """The point and the gradient there, with its graph, which is built once."""
        if self._graph is None:
            self._graph = self._loss.point, self._loss.gradients(self._loss.point, inputs=False, keep_graph=True)[0]
        return self._graph

    def _product(self, vector: Vector, own: bool, inputs: bool) -> tuple[Vector, dict[Tensor, Tensor]]:
        if self._graph is None and not self._used:
            self._used = True  # where a second product follows, the graph pays
            done = self._loss.product(vector, own, inputs)
            if done is not None:
                return done
        point, gradient = self._kept()
        wanted, others = point if own else (), self._loss.inputs() if inputs else []
        pairs = [(g, u) for g, u in zip(gradient, vector, strict=True) if g.requires_grad]
        if not pairs or not (wanted or others):
            return filled([None] * len(wanted), wanted), {}
        kept, given = zip(*pairs, strict=True)
        found = torch.autograd.grad(kept, (*wanted, *others), given, retain_graph=True, allow_unused=True)
        return filled(found[: len(wanted)], wanted), cotangents_of(others, found[len(wanted) :])


Derivative = Callable[[LocalLoss, Vector, bool], tuple[Vector, dict[Tensor, Tensor]]]


class _Directional:
    """Products as the derivative of the gradients along a direction, however that is taken."""

    def __init__(self, loss: LocalLoss, derivative: Derivative) -> None:
        self._loss = loss
        self._derivative = derivative

    def gradient(self) -> Vector:
        return self._loss.gradient()

    def own(self, vector: Vector) -> Vector:
        return self._derivative(self._loss, vector, True)[0]

    def cross(self, vector: Vector) -> Cotangents:
        return self._loss.pull(self._derivative(self._loss, vector, False)[1])

    def both(self, vector: Vector) -> tuple[Vector, Cotangents]:
        own, inputs = self._derivative(self._loss, vector, True)
        return own, self._loss.pull(inputs)


def _tangents(loss: LocalLoss, vector: Vector, own: bool) -> tuple[Vector, dict[Tensor, Tensor]]:
    """Forward-mode derivatives of the gradients along ``vector``."""
    with forward_ad.dual_level(), twice_differentiable():
        moving = tuple(forward_ad.make_dual(p, u) for p, u in zip(loss.point, vector, strict=True))
        value = loss(moving)
        inputs = loss.inputs()
        wanted = loss.point if own else ()
        if not wanted and not inputs:
            return (), {}
        found = torch.autograd.grad(value, [*wanted, *inputs], allow_unused=True)
        tangents = [None if g is None else forward_ad.unpack_dual(g).tangent for g in found]
    kept = [None if t is None else t.detach() for t in tangents]
    return filled(kept[: len(wanted)], wanted), cotangents_of(inputs, kept[len(wanted) :])


def _difference(
    loss: LocalLoss,
    vector: Vector,
    own: bool,
    radius: float,
    signs: Sequence[float],
    base: tuple[Vector, dict[Tensor, Tensor]] | None = None,
) -> tuple[Vector, dict[Tensor, Tensor]]:
    """The difference quotient of the gradients at points ``radius`` away along ``vector``, or of one and ``base``."""
    size = norm(vector)
    stride = torch.where(size > 0, radius / size, 0.0)
    total: Vector = () if base is None or not own else scaled(base[0], -1.0)
    inputs = {} if base is None else dict(zip(base[1], scaled(list(base[1].values()), -1.0), strict=True))
    for sign in signs:
        with torch.no_grad():
            moved = tuple(p.requires_grad_() for p in add(loss.point, vector, sign * stride))
        at_own, at_inputs = loss.gradients(moved, own)
        total = add(total, at_own, sign) if total else at_own  # the first sign is positive
        for key, gradient in at_inputs.items():
            inputs[key] = gradient.mul(sign) if key not in inputs else inputs[key].add(gradient, alpha=sign)
    weight = size / (len(signs) * radius)
    return scaled(total, weight), dict(zip(inputs, scaled(list(inputs.values()), weight), strict=True))
