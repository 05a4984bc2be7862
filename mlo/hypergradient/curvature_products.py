"""Curvature products: how u -> (H_tt u, H_xt u) is computed, for a problem's variables t and its reads x."""

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
    """A way to compute curvature products. Subclasses define their options as fields, and implement :meth:`open`."""

    needs_base: ClassVar[bool] = False  # whether the step should keep its gradients with respect to its reads
    keeps_graph: ClassVar[bool] = False  # whether the step should keep the graph of its gradient
    autocast: bool = Field(False, description="compute products under the problem's autocast, like its steps")

    def at(self, loss: LocalLoss) -> Curvature:
        """The curvature of ``loss`` at its point; the mean over micro-batches if there are several."""
        loss = loss.under_autocast() if self.autocast else loss
        return self.open(loss) if loss.alone else _MeanCurvature(loss, self.open)

    @abstractmethod
    def open(self, loss: LocalLoss) -> Curvature:
        """The curvature of ``loss``, which is on one micro-batch and already has the right autocast."""


class Exact(Product):
    """Double backward: exact. The graph of the gradient is kept for all products; one costs about 3 passes."""

    keeps_graph: ClassVar[bool] = True

    def open(self, loss: LocalLoss) -> Curvature:
        """See :class:`Product`."""
        return _ExactCurvature(loss)


class Forward(Product):
    """Forward over reverse: exact, with the memory of one backward pass. Each product costs 1 pass with tangents.

    It is not always faster: for small models on a CPU it is slower than ``exact``. Operators without a forward-mode
    derivative, such as fused attention, raise an error.
    """

    def open(self, loss: LocalLoss) -> Curvature:
        """See :class:`Product`."""
        return _Directional(loss, _tangents)


class Central(Product):
    """Central difference of two gradients (DARTS, Liu et al. 2019, eq. 8): 2 passes, without second derivatives.

    It is inaccurate where the loss has kinks (ReLU, max pooling) between the two points. They are ``radius`` away from
    the point, measured in the Euclidean norm over all variables. The default is the epsilon = 0.01 / |v| of the paper.
    """

    radius: float = Field(0.01, gt=0, description="distance of the two points from the middle, as a Euclidean norm")

    def open(self, loss: LocalLoss) -> Curvature:
        """See :class:`Product`."""
        return _Directional(loss, partial(_difference, radius=self.radius, signs=(1.0, -1.0)))


class OneSided(Product):
    """Forward difference with the gradient at the point itself: 1 pass for each product.

    For products at the state before a step, the gradient of that step is reused; elsewhere it costs one more pass. The
    error is of first order in ``radius``; that of ``central`` is of second order.
    """

    needs_base: ClassVar[bool] = True
    radius: float = Field(0.01, gt=0, description="distance of the second point, as a Euclidean norm")

    def open(self, loss: LocalLoss) -> Curvature:
        """See :class:`Product`."""
        return _Directional(loss, partial(_difference, radius=self.radius, signs=(1.0,), base=loss.base()))


ProductOption = Annotated[Product, Registered(PRODUCTS)]


class _MeanCurvature:
    """The mean over micro-batches, evaluated one at a time for each product, so that only one needs memory."""

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
    """Products by double backward."""

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
        """The point, and the gradient there with its graph, which is built once."""
        if self._graph is None:
            self._graph = self._loss.point, self._loss.gradients(self._loss.point, inputs=False, keep_graph=True)[0]
        return self._graph

    def _product(self, vector: Vector, own: bool, inputs: bool) -> tuple[Vector, dict[Tensor, Tensor]]:
        if self._graph is None and not self._used:
            self._used = True  # from the second product on, keeping the graph is cheaper
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
    """Products as directional derivatives of the gradient, computed by ``derivative``."""

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
    """The directional derivative of the gradients along ``vector``, in forward mode."""
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
    """The directional derivative of the gradients along ``vector``, as a difference of gradients.

    Args:
        radius: distance of each other point.
        signs: (1, -1) for a central difference, (1,) for a difference with ``base``.
        base: the gradients at the point itself.
    """
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
