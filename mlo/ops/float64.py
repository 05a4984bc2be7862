"""Programs evaluated in float64, even where they ask for float32 themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map, tree_map_only


class InFloat64(TorchFunctionMode):
    """A context in which torch computes in float64 wherever a program asks for less.

    Casts to float32, and to half precision, go to float64. New tensors are in float64. Where a function is given
    tensors of several precisions, the others are cast to float64. What changes in place keeps its dtype. Scripted
    modules are not affected. :class:`DrawnAs` is for the random numbers.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` in float64."""
        kwargs = kwargs or {}
        in_place, parts = changes_in_place(func, kwargs), list(tree_iter((args, kwargs)))
        if func not in _KEEP_DTYPE and any([isinstance(part, torch.dtype) for part in parts]):
            args, kwargs = tree_map(_wider, args), tree_map(_wider, kwargs)
        precisions = {part.dtype for part in parts if isinstance(part, Tensor)}
        if precisions & _WIDE and precisions & _WIDER.keys() and not in_place:
            args, kwargs = tree_map_only(Tensor, _wide, args), tree_map_only(Tensor, _wide, kwargs)
        result = _CASTS.get(func, func)(*args, **kwargs)
        if not isinstance(result, Tensor) or in_place:
            return result
        if (func in _NEW or func in _DRAW) and result.dtype in _WIDER:
            return _wide(result.detach()).requires_grad_(result.requires_grad)
        lower = func in _CASTS or precisions & _WIDER.keys() or any([isinstance(p, torch.dtype) for p in parts])
        return result.clone() if func in _COPIES and lower and result is args[0] else result  # a cast is a copy


class DrawnAs(TorchDispatchMode):
    """A context in which random numbers in float64 are those of another dtype.

    A generator draws other numbers for each dtype. In this context, operators draw them in ``dtype``, as in training,
    and they are converted. This holds for all that is drawn in float64, since a dtype does not show who asked for it.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._lower = {torch.float64: dtype, torch.complex128: torch.complex64}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator; if it is random, in the dtype of training."""
        kwargs = kwargs or {}
        if func is _DROPOUT and args[0].dtype in self._lower:  # only its mask is random
            ones = torch.ones_like(args[0], dtype=self._lower[args[0].dtype])
            mask, drops = func(ones, *args[1:])[1], args[2] is not False and args[1] < 1
            return args[0] * mask * (1 / (1 - args[1]) if drops else 1.0), mask
        given = tree_iter((args, kwargs))
        wide = func._schema.name in _DRAWS and any([getattr(each, "dtype", each) in self._lower for each in given])
        if not wide:
            return func(*args, **kwargs)
        if not func._schema.is_mutable:
            return _wide(func(*tree_map(self._lowered, args), **tree_map(self._lowered, kwargs)))
        written: Tensor = kwargs["out"] if "out" in kwargs else args[0]
        # of the same strides, on which the order of the numbers depends
        dtype = self._lower.get(written.dtype, written.dtype)
        lower = torch.empty_strided(written.shape, written.stride(), dtype=dtype, device=written.device)
        args, kwargs = tree_map(lambda each: lower if each is written else self._lowered(each), (args, kwargs))
        return written.copy_(func(*args, **kwargs))

    def _lowered(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self._lower.get(value.dtype, value.dtype))
        return self._lower.get(value, value) if isinstance(value, torch.dtype) else value


@contextmanager
def in_float64(dtype: torch.dtype | None, training: torch.dtype = torch.float32) -> Iterator[None]:
    """The contexts of float64 if ``dtype`` is float64; otherwise one that does nothing.

    Args:
        dtype: of the evaluation.
        training: the dtype in which random numbers are drawn.
    """
    if dtype is not torch.float64:
        yield
        return
    with InFloat64(), nullcontext() if training is torch.float64 else DrawnAs(training):
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
_DROPOUT = torch.ops.aten.native_dropout.default
_DRAWS = {
    *[f"aten::{name}" for name in ("rand", "rand_like", "randint", "randint_like", "randn", "randn_like")],
    *[f"aten::{name}" for name in ("binomial", "multinomial", "normal_functional", "poisson")],
    *[
        f"aten::{name}{ending}"
        for name in ("bernoulli", "cauchy", "exponential", "geometric", "log_normal", "normal", "random", "uniform")
        for ending in ("", "_")
    ],
}
_DRAW = {torch.normal, torch.rand, torch.rand_like, torch.randint, torch.randint_like, torch.randn, torch.randn_like}
_KEEP_DTYPE = {Tensor.view, *_DRAW}  # in view, of the same bits
_NEW = {
    torch.arange,
    torch.empty,
    torch.empty_strided,
    torch.eye,
    torch.full,
    torch.linspace,
    torch.logspace,
    torch.ones,
    torch.scalar_tensor,
    torch.tensor,
    torch.zeros,
}


def _wider(value: Any) -> Any:
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_WIDER[tensor.dtype]) if tensor.dtype in _WIDER else tensor
