"""Autocast per problem, independent of any ``torch.autocast`` around the call of the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch


class HasDevice(Protocol):
    """An object with a device."""

    device: torch.device


Self = TypeVar("Self", bound=HasDevice)
Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")


def outside_autocast(
    method: Callable[Concatenate[Self, Arguments], Returned],
) -> Callable[Concatenate[Self, Arguments], Returned]:
    """A decorator that runs the method with the caller's ``torch.autocast`` turned off.

    Otherwise backward passes and the sums between them would run in the caller's precision.
    """

    @wraps(method)
    def run(self: Self, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        kind = self.device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            return method(self, *args, **kwargs)

    return run


@contextmanager
def lowered(kind: str, dtype: torch.dtype) -> Iterator[None]:
    """A context for one evaluation under autocast to ``dtype``, on devices of type ``kind``, with the current weights.

    Torch caches casted weights until the outermost autocast context ends, even if that one is disabled. By then the
    weights may have been updated in place, so the cache is cleared before and after.
    """
    torch.clear_autocast_cache()
    try:
        with torch.autocast(kind, dtype):
            yield
    finally:
        torch.clear_autocast_cache()
