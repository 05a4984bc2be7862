"""Checks of a module's buffers: forward may change their values, but not add, remove or reshape them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Never

from torch import Tensor, nn

from mlo.errors import GraphError


class Unfilled:
    """The buffers of a module that hold no tensor at the start: registered as None, or not registered yet.

    An evaluation replaces the tensors that the module has, and restores them afterwards. A tensor that forward stores
    where there was none cannot be restored: it would stay in the module even after a virtual step.

    Attributes:
        dictionaries: of the module's buffers.
        count: how many buffers they had at the start.
        empty: where one is None.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parts = [
            (path, part, {key: buffer is not None for key, buffer in part._buffers.items()})
            for path, part in module.named_modules()
        ]
        self.dictionaries = [part._buffers for _, part, _ in self._parts]
        self.count = sum(map(len, self.dictionaries))
        self.empty = [(held, key) for held in self.dictionaries for key, buffer in held.items() if buffer is None]

    def filled(self, remove: bool = False) -> list[str]:
        """The names of those that hold a tensor by now; with ``remove``, these tensors are removed again."""
        if sum(map(len, self.dictionaries)) == self.count and all([held[key] is None for held, key in self.empty]):
            return []
        names = []
        for path, part, had in self._parts:
            for key in [key for key, buffer in part._buffers.items() if buffer is not None and not had.get(key)]:
                names.append(f"{path}.{key}" if path else key)
                if remove and key in had:
                    part._buffers[key] = None
                elif remove:
                    delattr(part, key)
        return names


def refuse_filled(problem: str, names: Sequence[str]) -> Never:
    """Raise a GraphError for buffers that held no tensor when the problem was made, but do now (``names``)."""
    raise GraphError(
        f"problem {problem!r}: forward sets the buffer {', '.join(map(repr, names))} of its module, which held no "
        "tensor when the problem was made, so a virtual step would leave one in the module; register the buffer "
        "with a tensor of its final shape, or call the module once before the problem is made"
    )


def refuse_reshaped(problem: str, name: str, before: Tensor, after: Tensor | None) -> None:
    """Raise a GraphError if forward set a buffer to None, or to a tensor of a different shape."""
    if after is None:
        raise GraphError(
            f"problem {problem!r}: forward sets its module's buffer {name!r}, which held a tensor, to None; keep a "
            "tensor of the same shape in it, and mark it as unused with a second buffer"
        )
    if after.shape != before.shape:
        raise GraphError(
            f"problem {problem!r}: forward sets its module's buffer {name!r}, of shape {tuple(before.shape)}, to a "
            f"tensor of shape {tuple(after.shape)}; the shape must stay the same, so register it with its final shape"
        )


def gone(problem: str, name: str) -> GraphError:
    """The error for a module that has lost one of its parameters or buffers."""
    return GraphError(
        f"problem {problem!r}: its module has no tensor {name!r} any more, but had one when the problem was made "
        "(torch.nn.utils.parametrize and prune replace a tensor by one with another name); change the module first, "
        "then make its optimizer and the problem"
    )
