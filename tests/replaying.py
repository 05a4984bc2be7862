"""CUDA graphs on the CPU: operations are recorded with their tensors, and replayed into the same memory.

As with a CUDA graph, numbers that are not in tensors are those of the recording, and a value read on the host is an
error. Unlike with one, the operations also run while they are recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

import mlo

READS = frozenset(("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"))


class Recorder(TorchDispatchMode):
    """A context in which operations are recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator.overloadpacket.__name__ in READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = operator(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in tensors_in((args, kwargs))}
        made = [t for t in tensors_in(result) if t.untyped_storage().data_ptr() not in given]
        self.calls.append((operator, args, kwargs, made))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Run the operations again; what they made is overwritten with what they make now."""
        for operator, args, kwargs, made in self.calls:
            result = operator(*args, **kwargs)
            given = {t.untyped_storage().data_ptr() for t in tensors_in((args, kwargs))}
            again = [t for t in tensors_in(result) if t.untyped_storage().data_ptr() not in given]
            for old, new in zip(made, again, strict=True):
                old.copy_(new)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors that have memory of their own: zeros of forward mode have none, and sparse ones that of others."""
    found = [leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]
    return [tensor for tensor in found if tensor.layout is torch.strided and not tensor._is_zerotensor()]


def record(function: Callable[[], None]) -> Callable[[], None]:
    """As :func:`mlo.training.captured.cuda_graph`."""
    with Recorder() as recorder:
        function()
    return recorder.replay


def assert_same(plain: mlo.Engine, captured: mlo.Engine, rtol: float = 1e-11) -> None:
    """All that a run consists of."""
    one, other = (tree_map(_comparable, engine.state_dict()) for engine in (plain, captured))
    torch.testing.assert_close(other, one, rtol=rtol, atol=rtol / 100)
    assert plain.passes == captured.passes
    assert plain.pullbacks == captured.pullbacks
    assert plain.rounds == captured.rounds


def _comparable(leaf: Any) -> Any:
    return 0 if isinstance(leaf, str) else leaf  # torch.testing compares no strings, such as a generator's kind
