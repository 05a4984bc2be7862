"""Replacements for operators of torch whose second or third derivative is missing or wrong."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction as _Reduction
from torch.overrides import TorchFunctionMode


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
        return _REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))


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
    dtype, v = v.dtype, _full(v)
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


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """:func:`torch.nn.functional.batch_norm`, with its arguments and its effect on the running statistics."""
    dtype, input = input.dtype, _full(input)
    others = [dim for dim in range(input.dim()) if dim != 1]
    mean, variance = running_mean, running_var
    if training:
        mean, variance = input.mean(others), input.var(others, correction=0)
        count = input.numel() / input.shape[1]
        if count == 1:
            raise ValueError(f"normalization takes more than one value per channel; the input has shape {input.shape}")
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.detach(), momentum)
            running_var.lerp_(variance.detach() * (count / (count - 1)), momentum)
    assert mean is not None and variance is not None, "torch requires them in evaluation mode"
    shape = [-1 if dim == 1 else 1 for dim in range(input.dim())]
    normal = (input - mean.view(shape)) * (variance + eps).rsqrt().view(shape)
    scaled = normal if weight is None else normal * weight.view(shape)
    return (scaled if bias is None else scaled + bias.view(shape)).to(dtype)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """:func:`torch.nn.functional.instance_norm`, with its arguments and its effect on the running statistics."""
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    instances, channels = input.shape[:2]

    def each(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.repeat(instances)

    joined = input.reshape(1, instances * channels, *input.shape[2:])
    mean, variance = each(running_mean), each(running_var)
    normal = _batch_norm(joined, mean, variance, each(weight), each(bias), True, momentum, eps)
    for running, after in ((running_mean, mean), (running_var, variance)):
        if running is not None and after is not None:
            running.copy_(after.view(instances, channels).mean(0))
    return normal.reshape(input.shape)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """:func:`torch.nn.functional.layer_norm`, with its arguments."""
    kept = torch.is_autocast_enabled("cuda") and input.device.type == "cuda"  # autocast on CUDA keeps it in float32
    dtype, input = torch.float32 if kept and input.dtype != torch.float64 else input.dtype, _full(input)
    last = tuple(range(-len(normalized_shape), 0))
    variance, mean = torch.var_mean(input, last, correction=0, keepdim=True)
    normal = (input - mean) * (variance + eps).rsqrt()
    scaled = normal if weight is None else normal * weight
    return (scaled if bias is None else scaled + bias).to(dtype)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """:func:`torch.nn.functional.hardsigmoid`, with its arguments."""
    value = F.relu6(input + 3) / 6
    return input.copy_(value) if inplace else value


def _huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """:func:`torch.nn.functional.huber_loss`, with its arguments."""
    away = input - target
    size = away.abs()
    loss = torch.where(size <= delta, 0.5 * away.square(), delta * (size - 0.5 * delta))
    return _reduced(loss if weight is None else loss * weight, reduction)


def _soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """:func:`torch.nn.functional.soft_margin_loss`, with its arguments."""
    return _reduced(-F.logsigmoid(target * input), reduction, size_average, reduce)


def _mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """:func:`torch.nn.functional.mse_loss`, with its arguments."""
    loss = (input - target).square()
    if weight is None:
        return _reduced(loss, reduction, size_average, reduce)
    loss = loss * weight
    return loss.sum() / weight.sum() if reduction == "mean" else _reduced(loss, reduction)


def _reduced(loss: Tensor, reduction: str, size_average: bool | None = None, reduce: bool | None = None) -> Tensor:
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """:func:`torch.cdist`, with its arguments."""
    distances: Tensor = torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)
    return distances


def _pdist(input: Tensor, p: float = 2.0) -> Tensor:
    """:func:`torch.nn.functional.pdist`, with its arguments."""
    one, other = torch.triu_indices(len(input), len(input), 1, device=input.device)
    distances: Tensor = torch.linalg.vector_norm(input[one] - input[other], p, -1)
    return distances


def _linear_cross_entropy(*args: Any, options: object = None, **kwargs: Any) -> Tensor:
    """:func:`torch.nn.functional.linear_cross_entropy`, not in chunks."""
    return F.linear_cross_entropy(*args, **kwargs)


def _full(input: Tensor) -> Tensor:
    """The input in float32 at least, as statistics are computed."""
    return input.float() if input.dtype in (torch.float16, torch.bfloat16) else input


_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.layer_norm: _layer_norm,
    F.hardsigmoid: _hardsigmoid,
    F.huber_loss: _huber_loss,
    F.soft_margin_loss: _soft_margin_loss,
    F.mse_loss: _mse_loss,
    F.pdist: _pdist,
    torch.cdist: _cdist,
}
if hasattr(F, "linear_cross_entropy"):
    _REPLACEMENTS[F.linear_cross_entropy] = _linear_cross_entropy
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
