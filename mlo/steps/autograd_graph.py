"""What an autograd graph refers to: its operators, its leaves, and the memory that it keeps alive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from mlo.levels.batch_trees import opened
from mlo.levels.state import State
from mlo.ops.torch_versions import packed


def nodes_of(ends: Iterable[Tensor | None]) -> Iterator[Any]:
    """The nodes of the graphs of these tensors, each once."""
    seen: set[Any] = set()
    waiting: list[Any] = [end.grad_fn for end in ends if end is not None]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions]


def nodes_towards(end: Tensor, leaves: Iterable[Tensor]) -> list[Any]:
    """The nodes of the graph of ``end`` that depend on these leaves."""
    followed: dict[Any, list[Any]] = {}
    wanted = {id(leaf) for leaf in leaves}
    waiting = []
    for node in nodes_of([end]):
        for following, _ in node.next_functions:
            followed.setdefault(following, []).append(node)
        if id(getattr(node, "variable", None)) in wanted:
            waiting.append(node)
    found = dict.fromkeys(waiting)
    while waiting:
        for node in followed.get(waiting.pop(), ()):
            if node not in found:
                found[node] = None
                waiting.append(node)
    return list(found)


def leaves_of(loss: Tensor) -> set[int]:
    """The ids of the leaf tensors of the graph of ``loss``."""
    return {id(node.variable) for node in nodes_of([loss]) if hasattr(node, "variable")}


def saved_bytes(ends: Iterable[Tensor | None], states: Iterable[State], batch: Any) -> int:
    """The memory that the graphs of these tensors keep alive, beyond ``states`` and ``batch``.

    The graphs are searched, rather than watched by saved-tensor hooks while they are made: torch.func does not run
    under such hooks. What a user's own hooks made of a tensor is not counted.
    """
    tensors = [t for state in states for t in (*state.variables, *state.constants, *state.buffers)]
    tensors += [t for t in tree_iter(opened(batch)) if isinstance(t, Tensor)]
    known = {t.untyped_storage().data_ptr() for t in tensors if t.layout is torch.strided}
    total = 0
    for node in nodes_of(ends):
        for tensor in packed(node):
            if tensor.layout is not torch.strided:
                continue
            storage = tensor.untyped_storage()
            try:
                place = storage.data_ptr()
            except RuntimeError:  # of a transform of torch.func, which has ended
                total += tensor.nbytes
                continue
            if place not in known:
                known.add(place)
                total += storage.nbytes()
    return total
