"""What may change in a module once its problem is made: the values of its tensors. The rest is refused here."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mlo.errors import GraphError


class Unfilled:
    """The buffers of a module that hold no tensor at the start: registered as None, or not registered yet.

    Evaluations put other tensors where the module has some. What forward puts where there was none stays in the module,
    after a look as after a step.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parts = [
            (path, part, {key: buffer is not None for key, buffer in part._buffers.items()})
            for path, part in module.named_modules()
        ]
        self._held = [part._buffers for _, part, _ in self._parts]
        self._count = sum(map(len, self._held))
        self._empty = [(held, key) for held in self._held for key, buffer in held.items() if buffer is None]

    def filled(self, take_away: bool = False) -> list[str]:
        """The names of those that hold a tensor by now, which is taken away again if that is asked for."""
        if sum(map(len, self._held)) == self._count and all(held[key] is None for held, key in self._empty):
            return []  # in every call of a module, so it is to cost next to nothing
        names = []
        for path, part, had in self._parts:
            for key in [key for key, buffer in part._buffers.items() if buffer is not None and not had.get(key)]:
                names.append(f"{path}.{key}" if path else key)
                if take_away and key in had:
                    part._buffers[key] = None
                elif take_away:
                    delattr(part, key)
        return names


def refuse_filled(problem: str, names: Sequence[str]) -> None:
    """Raise a GraphError if there are any: buffers that were :class:`Unfilled`."""
    if names:
        raise GraphError(
            f"problem {problem!r}: forward sets the buffer {', '.join(map(repr, names))} of its module, which held no "
            "tensor when the problem was made, so that a look ahead would leave one behind; register it with a tensor "
            "of the shape that it will have, or call the module once before the problem is made"
        )


def refuse_reshaped(problem: str, name: str, before: Tensor, after: Tensor | None) -> None:
    """Raise a GraphError if forward left no tensor as a buffer, or one of another shape."""
    if after is None:
        raise GraphError(
            f"problem {problem!r}: forward sets its module's buffer {name!r}, which held a tensor, to None; leave a "
            "tensor of its shape there, and let another buffer say whether it counts"
        )
    if after.shape != before.shape:
        raise GraphError(
            f"problem {problem!r}: forward sets its module's buffer {name!r}, of shape {tuple(before.shape)}, to a "
            f"tensor of shape {tuple(after.shape)}, which a step cannot take over; give it one shape from the start"
        )


def gone(problem: str, name: str) -> GraphError:
    """The error of a module that no longer has a tensor that it had."""
    return GraphError(
        f"problem {problem!r}: its module has no tensor {name!r} any more, which it had when the problem was made "
        "(torch.nn.utils.parametrize and prune put one of another name in its place); change the module first, then "
        "make its optimizer and the problem"
    )
