"""Runs operations on meta tensors, and remembers their results' shapes: torch computes most of these in Python."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype] | None


class KnownShapes:
    """Runs an operation with all arguments on the meta device in the time of making its results."""

    def __init__(self) -> None:
        self._known: dict[Hashable, _Layout | list[_Layout]] = {}

    def run(self, operator: Any, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """The result of the operation."""
        if operator.is_view:
            return operator(*args, **options)
        if operator._schema.is_mutable:
            if str(operator.overloadpacket.__name__).endswith("_"):  # in place: nothing to compute
                return args[0] if operator._schema.returns else None
            return operator(*args, **options)
        key = operator, _form(args), _form(tuple(options.items()))
        if key not in self._known:
            result = operator(*args, **options)
            if isinstance(result, bool | int):  # a question about two tensors, as in forward mode
                return result
            self._known[key] = [*map(_layout, result)] if isinstance(result, list | tuple) else _layout(result)
            return result
        known = self._known[key]
        return [*map(_made, known)] if isinstance(known, list) else _made(known)


def _form(value: Any) -> Hashable:
    """What the layout of a result depends on; a number's type matters too."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device.type
    if isinstance(value, list | tuple):
        return tuple(map(_form, value))
    return type(value), value


def _layout(result: Tensor | None) -> _Layout:
    if result is None:
        return None
    assert result.is_meta
    return result.shape, result.stride(), result.dtype


def _made(layout: _Layout) -> Tensor | None:
    return None if layout is None else torch.empty_strided(layout[0], layout[1], dtype=layout[2], device="meta")


def tensors_in(*values: Any) -> Iterator[Tensor]:
    """The tensors in arguments or results of an operation."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(*value)
