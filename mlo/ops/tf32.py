"""TensorFloat-32: whether float32 convolutions and matrix products may round their inputs to 10 bits of mantissa."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch

_NOTHING = nullcontext()


class Change(NamedTuple):
    """One changed setting of torch: how to set it, and its values."""

    set: Callable[[Any], None]
    before: Any
    after: Any


class Tf32:
    """TensorFloat-32 in the passes of an engine: steps may use it, curvature products do not.

    Torch's settings are of the whole process. They are changed while the engine is called, and the user's are restored
    afterwards.

    Args:
        steps: whether steps use it; None: as torch is set outside.
        gpu: whether the engine computes on a GPU, where torch lets cuDNN use it from the start.
    """

    def __init__(self, steps: bool | None = None, gpu: bool = True) -> None:
        self.steps, self._gpu = steps, gpu
        self._for_products: Sequence[Change] = ()

    @property
    def settings(self) -> list[tuple[Any, Any]]:
        """In a call of the engine: the settings of steps and of products, where they differ."""
        return [(change.before, change.after) for change in self._for_products]

    @contextmanager
    def in_call(self) -> Iterator[None]:
        """A context for a call of the engine: float32 is float32 in it, but :meth:`in_step`."""
        outer, for_steps = self._for_products, [] if self.steps is None else _allow(self.steps, self._gpu)
        try:
            self._for_products = _allow(False, self._gpu)
            yield
        finally:
            _undo(self._for_products)
            _undo(for_steps)
            self._for_products = outer

    def in_step(self) -> AbstractContextManager[None]:
        """A context, inside a call of the engine, for a pass that only a step needs. It runs at every step."""
        return _Undone(self._for_products) if self._for_products else _NOTHING


class _Undone:
    def __init__(self, changes: Sequence[Change]) -> None:
        self._changes = changes

    def __enter__(self) -> None:
        _undo(self._changes)

    def __exit__(self, *error: object) -> None:
        for change in self._changes:
            change.set(change.after)


def _undo(changes: Sequence[Change]) -> None:
    for change in reversed(changes):
        change.set(change.before)


def _allow(tf32: bool, gpu: bool) -> list[Change]:
    """Turn TensorFloat-32 on or off, and return what was changed for that.

    Torch has two sets of settings. To read the older one raises an error where the newer one contradicts it, so what
    the user has set is changed by the same set.
    """
    value = "tf32" if tf32 else "ieee"
    if not _older():  # after that above it, a setting is still another only if it was set by itself
        return [change for setting in _NEWER for change in _set(setting, "fp32_precision", value)]
    changes = _set(torch.backends.cudnn, "allow_tf32", tf32) if gpu else []
    precision = torch.get_float32_matmul_precision()
    if (precision != "highest") != tf32:
        before = precision, *[setting.fp32_precision for setting in _MATMUL]
        changes.append(Change(_set_matmul, before, ("high" if tf32 else "highest", *[value for _ in _MATMUL])))
        _set_matmul(changes[-1].after)
    return changes


def _older() -> bool:
    """Whether the older settings say all: nothing was set by the newer ones that those cannot express."""
    if any([setting.fp32_precision != "none" for setting in _NEWER[:2]]):
        return False
    try:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        return False
    return True


def _set(setting: Any, name: str, value: Any) -> list[Change]:
    before = getattr(setting, name)
    if before == value:
        return []
    setattr(setting, name, value)
    return [Change(partial(setattr, setting, name), before, value)]


def _set_matmul(values: Sequence[str]) -> None:
    """Set the older setting, which sets the newer ones with it, and then these."""
    torch.set_float32_matmul_precision(values[0])
    for setting, value in zip(_MATMUL, values[1:], strict=True):
        setting.fp32_precision = value


def _found(*paths: str) -> list[Any]:
    """The newer settings at these paths; none in releases of torch that have only the older ones."""
    if not hasattr(torch.backends, "fp32_precision"):
        return []
    return [attrgetter(path)(torch) for path in paths]


_MATMUL = _found("backends.cuda.matmul", "backends.mkldnn.matmul")
#: each after that from which it takes its value while it is not set itself
_NEWER = [
    *_found("backends", "backends.cudnn", "backends.cudnn.conv", "backends.cudnn.rnn"),
    *_MATMUL,
    *_found("backends.mkldnn.conv", "backends.mkldnn.rnn"),
]
