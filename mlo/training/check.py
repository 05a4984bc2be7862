"""check: is a hypergradient the derivative of its loss through the lower steps?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from mlo.errors import HypergradientError, InconclusiveError
from mlo.hypergradient import Implicit, Penalty, name_of
from mlo.levels.state import in_precision
from mlo.ops.vectors import dot, norm
from mlo.training.engine import Engine
from mlo.training.finite import refuse_looking_ahead
from mlo.training.stopped_gradients import StoppedGradients

FIRST = 1e-6  # radius of the first difference, relative to the size of the parameters
RADII = (1e-5, 1e-4, 1e-3, 1e-2)  # of further ones, where the first does not decide
VISIBLE = 1e-2  # a relative error that must be visible before the check passes
_AT_A_MINIMUM = (
    ": look at their residual (the attribute metrics of engine.hypergradient(...)), or run mlo.diagnose with more and "
    "more lower steps"
)
#: the loss at a distance along a direction of some number
Line = Callable[[int, float], float]


class Differences(NamedTuple):
    """Derivatives along directions, by finite differences.

    Attributes:
        values: one of each direction.
        doubt: how far they may be off, in the root of the sum of squares, by rounding and by the finite radius.
    """

    values: Sequence[float]
    doubt: float

    def refute(self, predicted: Sequence[float], tolerance: float) -> bool:
        """Whether predictions are off by more than the tolerance and what the differences may be off."""
        allowed = tolerance * math.hypot(*self.values) + 2 * self.doubt
        return not math.dist(predicted, self.values) <= allowed  # one that is not a number is refuted, too

    def clear(self, part: float) -> bool:
        """Whether the doubt is at most this part of the derivative."""
        return self.doubt <= part * math.hypot(*self.values)


def check(engine: Engine, name: str | None = None, *, directions: int = 4, tolerance: float = 1e-5) -> None:
    """Compare a hypergradient with finite differences, like ``torch.autograd.gradcheck``.

    The function is the loss of problem ``name`` after the next steps of the lower problems, as a function of its
    parameters. Its difference quotients along random directions are compared with the engine's hypergradient, all in
    float64 and on copies, also where a module computes in float32 inside. Estimators that only approximate this
    derivative (because they do not differentiate all steps, or differentiate a minimum instead of steps) fail.

    Values that a loss computes from its own parameters and detaches are constants of that function, as for autograd.
    So are problems among the ``held`` of a problem that reads them.

    Args:
        engine: in any state; it is not changed.
        name: the upper problem; None: the last in the engine's list.
        directions: number of random directions.
        tolerance: maximum relative error, in the root mean square over the directions. Where rounding blurs the
            differences more, as in a scripted module in float32, the error may be as large as that.

    Raises:
        HypergradientError: if they differ; the message lists both values along each direction.
        InconclusiveError: if rounding blurs the differences so much that an error of 1 % would not be seen, or if
            both are exactly 0.
        NonFiniteLossError: if a loss, gradient or buffer is not finite.
    """
    top = name or engine.graph.names[-1]
    found = engine.hypergradient(top, torch.float64)
    point = {n: in_precision(engine.problems[top].module.get_parameter(n).detach(), torch.float64) for n in found}
    draw, along = torch.Generator().manual_seed(0), list[dict[str, Tensor]]()
    for _ in range(directions):
        drawn = {n: torch.randn(p.shape, generator=draw, dtype=p.dtype).to(p.device) for n, p in point.items()}
        size = norm(tuple(drawn.values()))
        along.append({n: d / size for n, d in drawn.items()})
    predicted = [dot(tuple(found.values()), tuple(each.values())).item() for each in along]
    stopped = StoppedGradients(engine.problems.values())

    def loss(direction: int, distance: float) -> float:
        moved = {n: p + distance * along[direction][n] for n, p in point.items()}
        with stopped.recorded():
            return engine.objective(top, moved, torch.float64).item()

    with _uncompiled(engine):
        measured = differences(loss, predicted, tolerance, max(1.0, norm(tuple(point.values())).item()))
    if not (math.isfinite(norm(tuple(found.values())).item()) and all(map(math.isfinite, measured.values))):
        refuse_looking_ahead(engine, top)
    if not any(predicted) and not any(measured.values):
        raise InconclusiveError(
            f"the hypergradient of {top!r} cannot be checked: it is exactly 0, and so are the finite differences of "
            "its loss through the lower steps. If a learning rate is 0 (as in a warm-up), check after some "
            "rounds; otherwise the loss does not depend on the parameters here"
        )
    if measured.refute(predicted, tolerance):
        raise HypergradientError(_difference(engine, top, predicted, measured))
    if not measured.clear(VISIBLE / 3):
        raise InconclusiveError(
            f"the hypergradient of {top!r} cannot be checked: finite differences of its loss through the lower steps "
            f"are {math.hypot(*measured.values):.1e} along {directions} random directions, give or take "
            f"{measured.doubt:.1e} for rounding, so an error of 1 % would not be seen. They agree with the "
            "hypergradient as far as can be seen. Let modules compute in float64 (no scripted modules, no NumPy), or "
            "check a problem where the hypergradient is larger: with a larger learning rate or more steps below it"
        )


def differences(loss: Line, predicted: Sequence[float], tolerance: float, size: float = 1.0) -> Differences:
    """Difference quotients of ``loss``, as precise as is needed to tell whether the predictions are right.

    In float64, one small radius is enough. If it shows an error, or if rounding may hide one, there is a search for the
    radius at which quotients of two radii agree best.

    Args:
        loss: a function of the number of a direction and of a distance.
        predicted: the derivatives that are to be compared.
        tolerance: maximum relative error.
        size: what radii are relative to.
    """
    numbers, radius = range(len(predicted)), FIRST * size
    middle = loss(0, 0.0)  # first, since what losses detach there is held constant elsewhere
    ends = [(loss(n, radius), loss(n, -radius)) for n in numbers]
    rounding = 4 * torch.finfo(torch.float64).eps * max(abs(end) for pair in ends for end in pair) / radius
    best = Differences([(up - down) / (2 * radius) for up, down in ends], rounding * math.sqrt(len(predicted)))
    if best.clear(VISIBLE / 3) and not best.refute(predicted, tolerance):
        return best
    best = best._replace(doubt=math.inf)
    for relative in RADII:
        radius = relative * size
        found = _at(loss, middle, len(predicted), radius)
        best = found if found.doubt < best.doubt else best
        if best.refute(predicted, tolerance) or best.clear(tolerance):
            break
    if not any(best.values):  # the loss is the same at all these distances, or rounded to half precision at worst
        best = best._replace(doubt=torch.finfo(torch.float16).eps * abs(middle) / radius if any(predicted) else 0.0)
    return best


def _at(loss: Line, middle: float, count: int, radius: float) -> Differences:
    """Central differences at a radius; they may be off by what those at its double, and fourth differences, show."""
    values, doubts = [], []
    for n in range(count):
        up, down, above, below = (loss(n, by * radius) for by in (1, -1, 2, -2))
        near, far = (up - down) / (2 * radius), (above - below) / (4 * radius)
        noise = (above - 4 * up + 6 * middle - 4 * down + below) / (math.sqrt(70) * radius)
        values.append(near)
        # a loss that does not move may be rounded to a coarser grid
        doubts.append(math.inf if up == middle == down else math.hypot(near - far, noise))
    return Differences(values, math.hypot(*doubts))


@contextmanager
def _uncompiled(engine: Engine) -> Iterator[None]:
    """A context in which passes run uncompiled."""
    compilers = {name: level.compiler for name, level in engine._levels.items()}
    try:
        for level in engine._levels.values():
            level.compiler = None
        yield
    finally:
        for name, level in engine._levels.items():
            level.compiler = compilers[name]


def _difference(engine: Engine, top: str, predicted: Sequence[float], measured: Differences) -> str:
    """The message about a wrong hypergradient."""
    of_minimum = [isinstance(engine._plan.estimators[lower], Implicit | Penalty) for lower in engine._plan.paths[top]]
    error = math.dist(predicted, measured.values) / max(math.hypot(*measured.values), 1e-300)
    pairs = zip(predicted, measured.values, strict=True)
    values = "\n".join(f"  {one:+.9e}  {other:+.9e}" for one, other in pairs)
    return (
        f"the hypergradient of {top!r} is not the derivative of its loss through the lower steps: off by "
        f"{error:.1e} of its size. Along random directions, estimated and measured:\n"
        f"{values}\n"
        f"It was computed with {_estimators_of(engine, top)}. Of mlo's estimators, unrolled is exact, one_step is "
        "exact if a round has one step, and cg, neumann, nystrom and penalty can only be exact at a minimum"
        f"{_AT_A_MINIMUM if any(of_minimum) else ''}. If the "
        "estimator should be exact here, either a loss is not a pure function of the problems that it reads "
        f"(detach, no_grad, state kept between calls), or the estimator is wrong{_functions_of(engine)}"
        f"{_left_out(engine)}"
    )


def _estimators_of(engine: Engine, top: str) -> str:
    """Which estimators the hypergradient of ``top`` uses for which problems, in words."""
    used = []
    for lower in engine._plan.paths[top]:
        estimator = name_of(engine._plan.estimators[lower])
        used.append(f"{estimator} through {engine.problems[lower].steps} step(s) of {lower!r}")
    return " and ".join(used) or "no estimator"


def _functions_of(engine: Engine) -> str:
    """A hint, if losses call autograd.Functions, whose second derivative is as right as their backward."""
    found = sorted({function for level in engine._levels.values() for function in level.operators.functions})
    which = ", ".join(map(repr, found))
    return f", or that of an autograd.Function: {which} (try torch.autograd.gradgradcheck)" if found else ""


def _left_out(engine: Engine) -> str:
    """A hint, if the engine leaves inner paths out of the curvature."""
    nested = [] if engine.inner_path else engine._plan.nested
    return f". It leaves out the inner path of {', '.join(map(repr, nested))}: pass inner_path=True" if nested else ""
