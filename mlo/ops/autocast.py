"""Steps and looks in the precision that each problem has, whatever surrounds the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch


class Placed(Protocol):
    """What is on a device."""

    device: torch.device


Self = TypeVar("Self", bound=Placed)
Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")


def outside_autocast(
    method: Callable[Concatenate[Self, Arguments], Returned],
) -> Callable[Concatenate[Self, Arguments], Returned]:
    """The method, run without the ``torch.autocast`` that its caller may be in.

    Backward passes and the sums between them would else be in the caller's precision, losses in the problem's own.
    """

    @wraps(method)
    def run(self: Self, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        kind = self.device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            return method(self, *args, **kwargs)

    return run


@contextmanager
def lowered(kind: str, dtype: torch.dtype) -> Iterator[None]:
    """One evaluation under autocast, by the weights as they are now.

    Torch keeps its casts of weights until the outermost autocast ends, be that one off and the caller's; by then the
    weights may have moved, in place.
    """
    torch.clear_autocast_cache()
    try:
        with torch.autocast(kind, dtype):
            yield
    finally:
        torch.clear_autocast_cache()
