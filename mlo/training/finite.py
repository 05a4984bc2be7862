"""Which loss, gradient or buffer of a step is NaN or infinite, and of which problem: what the error then says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mlo.errors import NonFiniteLossError
from mlo.levels.problem import Problem
from mlo.levels.state import State
from mlo.ops.vectors import Vector, all_finite, existing, largest, norm, parts
from mlo.steps.losses import Found
from mlo.steps.scan import Joined

if TYPE_CHECKING:
    from mlo.training.engine import Engine

LOSS = "its loss"


class Seen(NamedTuple):
    """Numbers of one step that must be finite.

    Attributes:
        problem: whose step.
        step: how many steps it had taken before.
        labels: what each number is of.
        values: the numbers, on the device.
        virtual: whether the step is virtual: it is to blame only if the real step after it fails.
    """

    problem: str
    step: int
    labels: Sequence[str]
    values: Tensor
    virtual: bool = False


class Watch:
    """What is checked of one problem's steps: its loss, gradients, and buffers.

    A buffer that is not finite from the start (a mask of minus infinity) may stay so. It reads their values, so it is
    made once, before the module is moved to a GPU.
    """

    def __init__(self, problem: Problem) -> None:
        names, first = problem.places.names, problem.places.parameters
        buffers = problem.live_state().buffers
        floating = [i for i, b in enumerate(buffers) if b.is_floating_point() or b.is_complex()]
        known = [buffers[i] for i in floating if not buffers[i].is_meta]
        every = all_finite(known)
        self._checked = [i for i in floating if every or all_finite([buffers[i]])]
        self._of_gradients = [f"the gradient of its parameter {name!r}" for name in problem.variables]
        self._of_variables = [f"its parameter {name!r}" for name in problem.variables]
        self._of_buffers = [f"its buffer {names[first + i]!r}" for i in self._checked]

    def _step(self, gradients: Found, buffers: Vector) -> list[Tensor]:
        return [*existing(gradients), *self._buffers(buffers)]

    def _buffers(self, buffers: Vector) -> list[Tensor]:
        return [buffers[index] for index in self._checked] if buffers else []

    def refuse(
        self,
        problem: Problem,
        loss: Tensor,
        gradients: Found,
        buffers: Vector,
        step: int | None = None,
        top: str | None = None,
    ) -> None:
        """Raise an error if something of a step is not finite; the host waits for it.

        Args:
            step: how many steps came before it, if it is virtual.
            top: the problem that steps after it, if it is virtual.
        """
        found = self._step(gradients, buffers)
        size = norm(found).item() if found else 0.0  # a loss may read a problem only sometimes
        if math.isfinite(loss.item()) and math.isfinite(size):
            return
        # the squares of finite numbers may have overflowed
        for label, tensor in zip(self._labels(gradients, buffers), [loss, *found], strict=True):
            if not all_finite([tensor]):
                number = problem.step_number if step is None else step
                raise _error(problem.name, number, label, _example(tensor), top)

    def seen(self, problem: Problem, loss: Tensor, gradients: Found, buffers: Vector) -> Seen:
        """The same numbers, which stay on the device."""
        values = torch.stack([loss, *largest(self._step(gradients, buffers))])
        return Seen(problem.name, problem.step_number, self._labels(gradients, buffers), values)

    def joined(self, problem: Problem, joined: Joined) -> list[Seen]:
        """As :meth:`seen`, of several steps in one graph: their losses, and instead of gradients the last variables."""
        first, count = problem.step_number, len(joined.losses)
        found = [Seen(problem.name, first + i, [LOSS], loss[None]) for i, loss in enumerate(joined.losses)]
        return [*found, self.reached(problem, first + count - 1, joined.end)]

    def accepts(self, joined: Joined) -> bool:
        """Whether all of that is finite; the host waits for it."""
        end = joined.end
        return all_finite([*joined.losses, *[v.detach() for v in end.variables], *self._buffers(end.buffers)])

    def reached(self, problem: Problem, step: int, end: State) -> Seen:
        """What is seen of the state that a step led to."""
        own = [*[variable.detach() for variable in end.variables], *self._buffers(end.buffers)]
        labels = self._of_variables + (self._of_buffers if end.buffers else [])
        return Seen(problem.name, step, labels, torch.stack(largest(own)))

    def _labels(self, gradients: Found, buffers: Vector) -> list[str]:
        own = [label for label, gradient in zip(self._of_gradients, gradients, strict=True) if gradient is not None]
        return [LOSS, *own, *(self._of_buffers if buffers else [])]


def check(seen: Iterable[Seen], values: Iterable[float]) -> None:
    """Raise an error for the first step of which a number is not finite.

    Args:
        values: the numbers of all steps, one after another.
    """
    left, virtual = iter(values), list[tuple[str, int, str, float]]()
    for each in seen:
        bad = [(label, value) for label in each.labels if not math.isfinite(value := next(left))]
        if each.virtual:
            virtual += [(each.problem, each.step, *first) for first in bad[:1]]
        elif bad and virtual:
            raise _error(*virtual[0], each.problem)
        elif bad:
            raise _error(each.problem, each.step, *bad[0])
        else:
            virtual = []


def refuse_looking_ahead(engine: Engine, top: str, found: Mapping[str, Tensor] | None = None) -> None:
    """Raise an error if a loss, gradient or buffer on the way to the next loss of ``top`` is not finite.

    Args:
        engine: is not changed.
        top: an upper problem.
        found: its exact hypergradient, to be checked, too.
    """
    with engine._rounds.watched(top):
        loss = engine.objective(top, dtype=torch.float64)
    number = engine.problems[top].step_number
    of = {f"the gradient of its parameter {name!r}": tensor for name, tensor in (found or {}).items()}
    for label, tensor in ({LOSS: loss} | of).items():
        if not all_finite([tensor]):
            raise _error(top, number, label, _example(tensor))


def _example(tensor: Tensor) -> float:
    sizes = parts(tensor).abs()
    return sizes[~sizes.isfinite()].view(-1)[0].item() if tensor.dim() else tensor.item()


def _error(problem: str, step: int, label: str, value: float, top: str | None = None) -> NonFiniteLossError:
    at = f"problem {problem!r}: {label} is {value} at its step {step + 1}"
    if top is None:
        at += "; that step was not taken, and the state is the one before it"
    else:
        at += f", a virtual one before the step of {top!r}, which was not taken; the state is the one before it"
    return NonFiniteLossError(f"{at}. Lower the learning rate, set clip_norm, or check the batch for bad values")
