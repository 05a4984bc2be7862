"""What an autograd graph refers to: its leaves, and the memory that it keeps alive."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from mlo.levels.batch_trees import opened
from mlo.levels.state import State


def leaves_of(loss: Tensor) -> set[int]:
    """The ids of the leaf tensors of the graph of ``loss``."""
    found: set[int] = set()
    seen: set[Any] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions]
    return found


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the memory that graphs made inside keep alive, beyond ``states`` and ``batch``."""

    def __init__(self, states: Iterable[State], batch: Any) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        tensors = [t for state in states for t in (*state.variables, *state.constants, *state.buffers)]
        tensors += [t for t in tree_iter(opened(batch)) if isinstance(t, Tensor)]
        self._seen = {t.untyped_storage().data_ptr() for t in tensors if t.layout is torch.strided}
        self.total = 0

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided and (storage := tensor.untyped_storage()).data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor.detach()  # an operator's own output would form a reference cycle with its graph
