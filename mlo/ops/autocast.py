"""Autocast per problem, independent of any ``torch.autocast`` around the call of the engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
