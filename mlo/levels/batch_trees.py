"""The tensors of a batch, wherever they are: in what torch's pytree knows, and in the attributes of other objects."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from types import GeneratorType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import register_pytree_node, tree_leaves, tree_map

from mlo.errors import ConfigError


def opened(batch: Any, owner: str | None = None) -> Any:
    """The batch as a tree in which pytree finds all tensors.

    Objects that pytree does not know (dataclasses, user-defined dictionaries, classes of attrs, ...) are replaced by
    nodes of the tree, if they hold tensors. A tree that is made from this one by ``tree_map`` or ``tree_unflatten`` has
    objects of the same classes again, with the same other attributes.

    Args:
        owner: the name of a problem: then tensors that cannot be reached are an error.

    Raises:
        ConfigError: names the type that holds them.
    """
    return _opened(batch, owner, ())


def refuse_iterators(batch: Any, owner: str) -> None:
    """Raise a ConfigError for a batch that holds an iterator, which a second evaluation would find at its end."""
    for leaf in tree_leaves(opened(batch)):
        if isinstance(leaf, _READ_ONCE):
            raise ConfigError(
                f"problem {owner!r}: its batch holds an iterator ({type(leaf).__name__}), which can be read only once, "
                "but a loss may be evaluated several times on one batch; put a list of what it yields into the batch"
            )


_BACK = object()  # in place of an object that holds itself
#: what holds no tensors, or is one
_SIMPLE = (Tensor, bool, int, float, complex, str, bytes, type(None), np.generic, np.ndarray, type, ModuleType)
#: iterators that people put into batches
_READ_ONCE = (GeneratorType, map, filter, zip, enumerate, reversed)


class _Object:
    """An object as a node of a tree.

    Args:
        parts: its contents.
        form: what else is needed to make it again.
    """

    def __init__(self, parts: Sequence[Any], form: _Form) -> None:
        self.parts, self.form = parts, form


@dataclass(frozen=True)
class _Form:
    """What an object is but for its contents: ``items`` by key, and ``attributes`` by name."""

    kind: type
    items: tuple[Any, ...]
    attributes: tuple[str, ...]
    template: Any = field(compare=False, repr=False)

    def make(self, parts: Iterable[Any]) -> Any:
        """An object like the template, with other contents."""
        values = list(parts)
        made: Any
        items, attributes = values[: len(self.items)], values[len(self.items) :]
        if self.kind is PackedSequence:
            return PackedSequence(attributes[0], self.template.batch_sizes, *attributes[1:])
        if issubclass(self.kind, tuple):
            made = tuple.__new__(self.kind, items)  # whatever __new__ of its class takes
        elif issubclass(self.kind, dict | list):
            made = copy(self.template)
            for key, item in zip(self.items, items, strict=True):
                made[key] = item
        else:
            made = object.__new__(self.kind) if self.kind.__new__ is object.__new__ else copy(self.template)
        for name, value in zip(self.attributes, attributes, strict=True):
            object.__setattr__(made, name, value)
        return made


register_pytree_node(
    _Object,
    lambda node: (list(node.parts), node.form),
    lambda parts, form: form.make(parts),
)


def _opened(value: Any, owner: str | None, within: tuple[int, ...]) -> Any:
    def visit(part: Any) -> Any:
        return part if isinstance(part, _SIMPLE) else _node(part, owner, within)

    return tree_map(visit, value, is_leaf=_is_object)


def _is_object(part: Any) -> bool:
    """Whether pytree would take it for a plain tuple, which it is not."""
    if isinstance(part, PackedSequence):
        return True
    # a subclass of a named tuple, whose class may take other arguments than its fields
    return isinstance(part, tuple) and hasattr(part, "_fields") and "_fields" not in vars(type(part))


def _node(value: Any, owner: str | None, within: tuple[int, ...]) -> Any:
    """The node for an object that holds tensors; of any other, itself."""
    if id(value) in within:
        return _BACK
    items, attributes = _contents(value)
    parts = [_opened(part, owner, (*within, id(value))) for part in (*items.values(), *attributes.values())]
    leaves = tree_leaves(parts)
    if not any([isinstance(leaf, Tensor) for leaf in leaves]):
        return value
    back = any([leaf is _BACK or isinstance(leaf, weakref.ref) for leaf in leaves])
    reason = "it refers to itself, or to what holds it" if back else _obstacle(value)
    if reason is None:
        return _Object(parts, _Form(type(value), tuple(items), tuple(attributes), value))
    if owner is None:
        return value
    raise ConfigError(
        f"problem {owner!r}: its batch holds tensors in a {type(value).__name__}, which cannot be moved to the device: "
        f"{reason}. Put them into a dictionary, a tuple or a dataclass, or register the class with "
        "torch.utils._pytree.register_pytree_node"
    )


def _contents(value: Any) -> tuple[dict[Any, Any], dict[str, Any]]:
    """The items and the attributes of an object."""
    if isinstance(value, PackedSequence):  # its sizes stay on the CPU
        return {}, {"data": value.data, "sorted": value.sorted_indices, "unsorted": value.unsorted_indices}
    items: dict[Any, Any] = {}
    if isinstance(value, dict):
        items = dict(value)
    elif isinstance(value, list | tuple | set | frozenset):
        items = dict(enumerate(value))
    slots = [name for kind in type(value).__mro__ for name in _names(vars(kind).get("__slots__", ()))]
    attributes = {name: getattr(value, name) for name in slots if name != "__dict__" and hasattr(value, name)}
    return items, attributes | getattr(value, "__dict__", {})


def _names(slots: str | Iterable[str]) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


def _obstacle(value: Any) -> str | None:
    """Why an object cannot be made again with other tensors; None if it can."""
    if isinstance(value, nn.Module):
        return "it is a module, which belongs to a problem"
    if isinstance(value, set | frozenset):
        return "sets have no order"
    if isinstance(value, tuple):
        return None  # made without a copy
    try:
        copy(value)
    except TypeError:
        return "it cannot be copied"
    return None
