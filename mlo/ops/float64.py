"""Programs evaluated in float64, even where they ask for float32 themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map, tree_map_only


class InFloat64(TorchFunctionMode):
    """A context in which torch computes in float64 wherever a program asks for less.

    Casts to float32, and to half precision, go to float64. New tensors are in float64; their random numbers are those
    that would be drawn without the context. Where a function is given tensors of several precisions, the others are
    cast to float64. What changes in place keeps its dtype. Scripted modules are not affected.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` in float64."""
        kwargs = kwargs or {}
        in_place, parts = changes_in_place(func, kwargs), list(tree_iter((args, kwargs)))
        if func not in _REINTERPRET and any([isinstance(part, torch.dtype) for part in parts]):
            args, kwargs = tree_map(_wider, args), tree_map(_wider, kwargs)
        precisions = {part.dtype for part in parts if isinstance(part, Tensor)}
        if precisions & _WIDE and precisions & _WIDER.keys() and not in_place:
            args, kwargs = tree_map_only(Tensor, _wide, args), tree_map_only(Tensor, _wide, kwargs)
        result = _CASTS.get(func, func)(*args, **kwargs)
        if not isinstance(result, Tensor) or in_place:
            return result
        if func in _NEW and result.dtype in _WIDER:
            return _wide(result.detach()).requires_grad_(result.requires_grad)
        lower = func in _CASTS or precisions & _WIDER.keys() or any([isinstance(p, torch.dtype) for p in parts])
        return result.clone() if func in _COPIES and lower and result is args[0] else result  # a cast is a copy


@contextmanager
def in_float64(dtype: torch.dtype | None) -> Iterator[None]:
    """The context :class:`InFloat64` if ``dtype`` is float64; otherwise one that does nothing."""
    if dtype is not torch.float64:
        yield
        return
    with InFloat64():
        yield


def changes_in_place(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function of torch writes into one of its arguments."""
    name = getattr(func, "__name__", "")
    augmented = name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    plain = name.endswith("_") and not name.endswith("__")
    return plain or augmented or name in ("__setitem__", "__set__") or kwargs.get("out") is not None


_WIDE = {torch.float64, torch.complex128}
_WIDER = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
_CASTS: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.float: Tensor.double,
    Tensor.half: Tensor.double,
    Tensor.bfloat16: Tensor.double,
}
_COPIES = {*_CASTS, Tensor.to, Tensor.type, Tensor.type_as}
_REINTERPRET = {Tensor.view}  # of the same bits
_NEW = {
    torch.arange,
    torch.empty,
    torch.empty_strided,
    torch.eye,
    torch.full,
    torch.linspace,
    torch.logspace,
    torch.normal,
    torch.ones,
    torch.rand,
    torch.randn,
    torch.scalar_tensor,
    torch.tensor,
    torch.zeros,
}


def _wider(value: Any) -> Any:
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_WIDER[tensor.dtype]) if tensor.dtype in _WIDER else tensor
