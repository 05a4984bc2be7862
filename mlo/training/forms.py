"""The form of plain values and tensors: whether one has the same names, types and shapes as another.

All functions raise a CheckpointError that names the part, which is ``where``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor

from mlo.errors import CheckpointError


def same_names(given: Any, expected: Any, where: str, also: tuple[str, ...] = ()) -> None:
    """Whether a mapping has exactly these names; it may have those in ``also``."""
    if not isinstance(given, Mapping):
        wrong(where.rstrip(":. "), given, "a mapping")
    for name in expected:
        if name not in given:
            raise CheckpointError(f"{where}{name} is missing there")
    for name in given:
        if name not in expected and name not in also:
            raise CheckpointError(f"{where}{name} is in the checkpoint only")


def same_form(given: Any, expected: Any, where: str, grows: bool = False) -> None:
    """Whether a value has the types, names and shapes of another one; any number or text goes where that one has None.

    With ``grows``, it may have more names and longer lists.
    """
    if isinstance(expected, Mapping):
        same_names(given, expected, f"{where}.", also=tuple(given) if grows and isinstance(given, Mapping) else ())
        for name, value in expected.items():
            same_form(given[name], value, f"{where}.{name}", grows)
    elif isinstance(expected, list | tuple):
        missing = not isinstance(given, list | tuple) or len(given) < len(expected)
        if missing or (len(given) > len(expected) and not grows):
            wrong(where, given, _about(expected))
        for number, value in enumerate(expected):
            same_form(given[number], value, f"{where}[{number}]", grows)
    else:
        _same_leaf(given, expected, where)


def _same_leaf(given: Any, expected: Any, where: str) -> None:
    if isinstance(expected, Tensor):
        fits = isinstance(given, Tensor) and given.shape == expected.shape and given.dtype == expected.dtype
    elif isinstance(expected, int | float) and not isinstance(expected, bool):
        fits = isinstance(given, int | float) and not isinstance(given, bool)
    else:
        fits = type(given) is type(expected) or (expected is None and isinstance(given, bool | int | float | str))
    if not fits:
        wrong(where, given, _about(expected))


def count(value: Any, where: str) -> None:
    """Whether a value is a number of things."""
    if type(value) is not int or value < 0:
        wrong(where, value, "a whole number, 0 or more")


def wrong(where: str, given: Any, expected: str) -> NoReturn:
    """Raise the error for a part that does not fit."""
    raise CheckpointError(f"{where} is {_about(given)} there, and should be {expected}")


def _about(value: Any) -> str:
    """A value in few words."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return repr(value) if isinstance(value, int | float | None) else f"of type {type(value).__name__}"
