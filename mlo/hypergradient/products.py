"""Curvature products: how u -> (H_tt u, H_xt u) is computed, for a level's variables t and its reads x."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat
from operator import is_not
from typing import Annotated, ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor

from mlo.errors import ConfigError
from mlo.hypergradient.tangents import tangents
from mlo.levels.read_cache import ReadCache
from mlo.levels.state import leaves
from mlo.ops.derivatives import Mode
from mlo.ops.vectors import Vector, add, dense, difference, filled, norm, scaled, total
from mlo.options.config import Config, Registered
from mlo.options.registry import PRODUCTS
from mlo.steps import compiled
from mlo.steps.losses import Found
from mlo.steps.operators import reraise
from mlo.steps.point import Gradient, Point, Wanted, gradient, states_at
from mlo.steps.step import Cotangents, Step, reached


class Curvature(Protocol):
    """The second derivatives of a level's loss at one point, t its variables and x what it reads."""

    def __call__(self, vector: Vector, own: bool = True, cross: bool = True) -> tuple[Vector, Cotangents]:
        """H_tt u, and {x: H_xt u} (None: nothing depends on x), of the vector u; what is not wanted is empty."""


class Product(Config, ABC):
    """A way to compute curvature products. Subclasses define their options as fields, and implement :meth:`open`."""

    needs_base: ClassVar[bool] = False  # whether the step should keep its gradients with respect to its reads
    keeps_graph: ClassVar[bool] = False  # whether the step should keep the graph of its gradient
    mode: ClassVar[Mode | None] = None  # how the gradient is differentiated; None: it is not
    autocast: bool = Field(False, description="compute products under the problem's autocast, like its steps")

    def before(self, step: Step, targets: Sequence[str]) -> Curvature:
        """The curvature at the variables that a step was taken from, with the ``targets`` as reads.

        Raises:
            ConfigError: if the estimator did not ask for the state before the step.
        """
        if not step.stored:
            raise ConfigError(
                f"problem {step.point.level.name!r}: product.before needs the state before the step, which was not "
                "kept; return mlo.Recording(before=True) from the estimator's property recording"
            )
        return self._at(step.point, targets, step)

    def after(self, step: Step, targets: Sequence[str]) -> Curvature:
        """The curvature at the solution, with the ``targets`` as reads."""
        return self._at(step.at_solution(), targets, None)

    def _at(self, point: Point, targets: Sequence[str], step: Step | None) -> Curvature:
        if len(point.micro) > 1:
            return partial(_mean, [partial(self._at, part, targets, None) for part in point.parts()])
        lowered = point.level.problem.autocast is not None
        if lowered:
            step, point = None, point._replace(autocast=self.autocast, cache=ReadCache(point.level.device))
        elif point.cache is None and (step is None or step.graph is None):
            point = point._replace(cache=ReadCache(point.level.device))
        return self.open(point, targets, step)

    @abstractmethod
    def open(self, point: Point, targets: Sequence[str], step: Step | None) -> Curvature:
        """The curvature at a point, of one micro-batch.

        Args:
            targets: the problems x.
            step: the step that was taken at this point, with what it keeps; None for any other point.
        """


class Exact(Product):
    """Double backward: exact. The graph of the gradient is kept for all products; one costs about 3 passes."""

    keeps_graph: ClassVar[bool] = True
    mode: ClassVar[Mode | None] = "reverse"

    def open(self, point: Point, targets: Sequence[str], step: Step | None) -> Curvature:
        """See :class:`Product`."""
        if step is not None and step.graph is None and step.needs_gradient:  # the step's transpose takes it from there
            step.graph, step.point = _with_graph(point, targets), point
        kept = None if step is None else step.graph
        used = False

        def product(vector: Vector, own: bool = True, cross: bool = True) -> tuple[Vector, Cotangents]:
            nonlocal kept, used
            of = [*((point.level.name,) if own else ()), *(targets if cross else ())]
            if kept is None and not used and compiled.applies(point):
                used = True  # from the second product on, keeping the graph is cheaper
                found = _compiled_product(point, vector, of, targets)
                if found is not None:
                    return _parted(point, found, (), own, targets if cross else ())
            if kept is None:
                kept = _with_graph(point, targets)
            variables, of_loss = kept
            cached = point.cache.leaves if cross and point.cache is not None else []
            reads = _variables(point, targets) if cross else []
            inputs = [*(variables if own else ()), *reads, *cached]
            derivative: Found = [None] * len(inputs)
            outputs, given = [], []
            for part, weight in zip(of_loss, vector, strict=True):
                if part.requires_grad:
                    outputs.append(part)
                    given.append(weight)
            if outputs and inputs:
                try:
                    derivative = torch.autograd.grad(outputs, inputs, given, retain_graph=True, allow_unused=True)
                except RuntimeError as error:
                    reraise(point.level, error)
            end = len(inputs) - len(cached)
            return _parted(point, derivative[:end], derivative[end:], own, targets if cross else ())

        return product


def _with_graph(point: Point, targets: Sequence[str]) -> tuple[Vector, Vector]:
    """The level's variables, and the gradient at them with its graph."""
    at = point.at(leaves(point.state.variables))
    done = gradient(at, Wanted((point.level.name,), reached=targets, keep_graph=True))
    return at.state.variables, filled(done.found[point.level.name], at.state.variables)


class Forward(Product):
    """Forward over reverse: exact, and nothing is kept between products. Each costs 1 pass with tangents.

    It is not always faster: for small models on a CPU it is slower than ``exact``. Operators without a forward-mode
    derivative, such as grid_sample, raise an error.
    """

    mode: ClassVar[Mode | None] = "forward"

    def open(self, point: Point, targets: Sequence[str], step: Step | None) -> Curvature:
        """See :class:`Product`."""

        def product(vector: Vector, own: bool = True, cross: bool = True) -> tuple[Vector, Cotangents]:
            try:
                found = tangents(point, targets, vector, own, cross)
            except RuntimeError as error:
                reraise(point.level, error)
            assert point.cache is not None
            end = len(found) - (len(point.cache.leaves) if cross else 0)
            return _parted(point, found[:end], found[end:], own, targets if cross else ())

        return product


class Central(Product):
    """Central difference of two gradients (DARTS, Liu et al. 2019, eq. 8): 2 passes, without second derivatives.

    It is inaccurate where the loss has kinks (ReLU, max pooling) between the two points. They are ``radius`` away from
    the point, measured in the Euclidean norm over all variables. The default is the epsilon = 0.01 / |v| of the paper.
    """

    radius: float = Field(0.01, gt=0, description="distance of the two points from the middle, as a Euclidean norm")

    def open(self, point: Point, targets: Sequence[str], step: Step | None) -> Curvature:
        """See :class:`Product`."""
        return partial(_difference, point, targets, self.radius, None)


class OneSided(Product):
    """Forward difference with the gradient at the point itself: 1 pass for each product.

    For products at the state before a step, the gradient of that step is reused; elsewhere it costs one more pass. The
    error is of first order in ``radius``; that of ``central`` is of second order.
    """

    needs_base: ClassVar[bool] = True
    radius: float = Field(0.01, gt=0, description="distance of the second point, as a Euclidean norm")

    def open(self, point: Point, targets: Sequence[str], step: Step | None) -> Curvature:
        """See :class:`Product`."""
        base = None if step is None else step.base
        if base is None:
            of = (point.level.name, *targets)
            base = gradient(_moved(point, ()), Wanted(of, at_leaves=True))
        return partial(_difference, point, targets, self.radius, base)


ProductOption = Annotated[Product, Registered(PRODUCTS)]


def _difference(
    point: Point,
    targets: Sequence[str],
    radius: float,
    base: Gradient | None,
    vector: Vector,
    own: bool = True,
    cross: bool = True,
) -> tuple[Vector, Cotangents]:
    """The directional derivative of the gradients along ``vector``, as a difference of gradients.

    Args:
        radius: distance of each other point.
        base: the gradients at the point itself; None: those on the other side.
    """
    size = norm(vector)
    stride = torch.where(size > 0, radius / size, 0.0)
    of = [*((point.level.name,) if own else ()), *(targets if cross else ())]
    sides = [
        gradient(_moved(point, vector, sign * stride), Wanted(of, reached=targets, at_leaves=cross))
        for sign in ((1.0, -1.0) if base is None else (1.0,))
    ]
    weight = size / (len(sides) * radius)
    return slope(point, sides[0], sides[1] if base is None else base, own, targets if cross else (), weight)


def slope(
    point: Point, one: Gradient, other: Gradient, own: bool, targets: Sequence[str], weight: Tensor
) -> tuple[Vector, Cotangents]:
    """The difference of two gradients times ``weight``: for the level's own variables, and for the targets."""
    of = [*((point.level.name,) if own else ()), *targets]
    flat = [part for name in of for part in difference(one.found[name], other.found[name], weight)]
    at_leaves = difference(one.leaves, other.leaves, weight) if targets else ()
    return _parted(point, flat, at_leaves, own, targets)


def _moved(point: Point, vector: Vector, stride: float | Tensor = 0.0) -> Point:
    with torch.no_grad():
        variables = point.state.variables
        if point.apart:
            shift = scaled(vector or variables, stride if vector else 0.0)
            return point.at(leaves(variables))._replace(shift=shift)
        return point.at(leaves(add(variables, vector, stride) if vector else variables))


def _variables(point: Point, names: Sequence[str]) -> list[Tensor]:
    found: list[Tensor] = []
    for name in names:
        found += point.reads[name].variables
    return found


def _parted(
    point: Point, found: Found, at_leaves: Found, own: bool, targets: Sequence[str]
) -> tuple[Vector, Cotangents]:
    """Flat derivatives as the part of the level's own variables, and that of each target."""
    mine, found = point.state.variables if own else (), dense(found)
    direct = found[len(mine) :]
    if point.cache is not None and any(map(is_not, at_leaves, repeat(None))):
        direct = point.cache.pull(at_leaves, _variables(point, targets), direct)
    cross: Cotangents = {}
    begin = 0
    for target in targets:
        variables = point.reads[target].variables
        cross[target] = reached(direct[begin : begin + len(variables)], variables)
        begin += len(variables)
    return filled(found[: len(mine)], mine) if own else (), cross


def _compiled_product(point: Point, vector: Vector, of: Sequence[str], targets: Sequence[str]) -> Found | None:
    states, _ = states_at(point, point.micro[0])
    held = point.level.problem.node.held
    return compiled.product(point, states, point.micro[0], vector, of, set(targets).difference(held), "product")


def _mean(
    parts: Sequence[Callable[[], Curvature]], vector: Vector, own: bool = True, cross: bool = True
) -> tuple[Vector, Cotangents]:
    """The mean over micro-batches, evaluated one at a time for each product, so that only one needs memory."""
    mine: Vector = ()
    others: Cotangents = {}
    for part in parts:
        found, across = part()(vector, own, cross)
        mine = add(mine, found) if mine else found
        for target, more in across.items():
            others[target] = total(others.get(target), more)
    share = 1 / len(parts)
    return scaled(mine, share), {t: None if c is None else scaled(c, share) for t, c in others.items()}
