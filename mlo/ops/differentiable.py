"""Replacements for operators of torch whose second or third derivative is missing or wrong."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mlo.ops.elementary import REPLACEMENTS, full


class TwiceDifferentiable:
    """A context in which operators without a correct second derivative are replaced.

    Scaled-dot-product attention uses its math kernel, because the fused kernels have no second derivative. Weight
    normalization is computed with elementary operators, because the second derivative of torch's fused operator treats
    the norms as constants. Recurrent layers use torch's own kernels, because those of cuDNN have no second derivative,
    and those of oneDNN (for CPUs) none in forward mode. All replacements affect the whole process while the context is
    active.

    Args:
        elementary: whether :class:`ElementaryOperators` is entered, too.
    """

    def __init__(self, elementary: bool = False) -> None:
        self._elementary = ElementaryOperators() if elementary else None

    def __enter__(self) -> None:  # runs at every step, so it must be cheap
        self._outside, self._kernels = [], list[bool]()
        self._math = torch.backends.cuda.math_sdp_enabled()
        for namespace, name, replacement in _OPERATORS:
            self._outside.append(namespace[name])
            namespace[name] = replacement
        for enabled, enable in _FUSED_ATTENTION:
            self._kernels.append(enabled())
            enable(False)
        torch.backends.cuda.enable_math_sdp(True)
        if self._elementary is not None:
            self._elementary.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._elementary is not None:
            self._elementary.__exit__(*error)
        for (namespace, name, _), function in zip(_OPERATORS, self._outside, strict=True):
            namespace[name] = function
        for (_, enable), was_enabled in zip(_FUSED_ATTENTION, self._kernels, strict=True):
            enable(was_enabled)
        torch.backends.cuda.enable_math_sdp(self._math)


class ElementaryOperators(TorchFunctionMode):
    """A context in which some operators are computed with elementary ones. It is slower, so only some losses need it.

    Batch, instance and layer normalization have no correct third derivative. For batch normalization (and instance
    normalization, which uses it), reverse mode raises an error, and in forward mode the result is silently wrong. For
    layer normalization it is wrong in both modes. Group and root-mean-square normalization are correct.

    Hard sigmoid has no second derivative, and a chunked linear cross-entropy has a wrong one. Distances, Huber loss and
    soft margin loss have none in forward mode.

    Attributes:
        active: number of these contexts that are currently entered.
    """

    active: ClassVar[int] = 0

    def __enter__(self) -> Self:
        ElementaryOperators.active += 1
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        ElementaryOperators.active -= 1
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``, or its replacement."""
        return REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))


def with_current_operators(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which will use the operator replacements that are active now whenever it is called later."""
    twice, elementary = torch._weight_norm is _weight_norm, ElementaryOperators.active > 0
    if not (twice or elementary):
        return function

    def again(*args: Any, **kwargs: Any) -> Any:
        with TwiceDifferentiable() if twice else nullcontext(), ElementaryOperators() if elementary else nullcontext():
            return function(*args, **kwargs)

    return again


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Replaces ``torch._weight_norm``, with the same arguments."""
    dtype, v = v.dtype, full(v)
    return (v * (g / torch.norm_except_dim(v, 2, dim))).to(dtype)


def _plain(recurrent: Callable[..., Any]) -> Callable[..., Any]:
    """The operator of a recurrent layer, run by torch's own kernels; convolutions around it still use cuDNN."""

    def run(*args: Any, **kwargs: Any) -> Any:
        libraries: tuple[Any, Any] = torch.backends.cudnn, torch.backends.mkldnn
        outside = [library.enabled for library in libraries]
        try:
            for library in libraries:
                library.enabled = False
            return recurrent(*args, **kwargs)
        finally:
            for library, was_enabled in zip(libraries, outside, strict=True):
                library.enabled = was_enabled

    return run


_FUSED_ATTENTION: list[tuple[Callable[[], bool], Callable[[bool], object]]] = [
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
]
_FUNCTIONS = vars(torch)
# torch has no option for these: the namespaces in which parametrizations, older hooks and recurrent layers find them
_OPERATORS: list[tuple[dict[str, Any], str, Callable[..., Any]]] = [
    (_FUNCTIONS, "_weight_norm", _weight_norm),
    (vars(importlib.import_module("torch.nn.utils.weight_norm")), "_weight_norm", _weight_norm),
]
for _name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
    _replacement = _plain(_FUNCTIONS[_name])
    vars(torch._VF)[_name] = _FUNCTIONS[_name]  # where it is looked up, but is not stored
    _OPERATORS += [(namespace, _name, _replacement) for namespace in (_FUNCTIONS, vars(torch._VF))]
