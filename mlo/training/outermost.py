"""What surrounds each call of an engine that evaluates losses: its precision, and help when memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

from mlo.ops.tf32 import Tf32
from mlo.training.memory import advice
from mlo.training.plan import Plan


class Parts(Protocol):
    """What is used of an engine."""

    device: torch.device
    _plan: Plan
    _tf32: Tf32


Self = TypeVar("Self", bound=Parts)
Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")


def outermost(
    method: Callable[Concatenate[Self, Arguments], Returned],
) -> Callable[Concatenate[Self, Arguments], Returned]:
    """A decorator that runs the method without the caller's ``torch.autocast``, and with the engine's TensorFloat-32.

    Otherwise backward passes and the sums between them would run in the caller's precision. An out-of-memory error gets
    a note that says what needs less memory.
    """

    @wraps(method)
    def run(self: Self, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        kind = self.device.type
        autocast = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
        with autocast, self._tf32.in_call():
            self._plan.checks.run()
            try:
                return method(self, *args, **kwargs)
            except torch.OutOfMemoryError as error:
                error.add_note(advice(self._plan))
                raise

    return run


def look(
    method: Callable[Concatenate[Self, Arguments], Returned],
) -> Callable[Concatenate[Self, Arguments], Returned]:
    """:func:`outermost`, for a method that leaves all parameters as they are."""

    @wraps(method)
    def run(self: Self, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        with self._plan.checks.unwritten():
            return method(self, *args, **kwargs)

    return outermost(run)
