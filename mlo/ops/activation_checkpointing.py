"""Activation checkpointing under substituted parameters.

``torch.utils.checkpoint`` runs a part of the forward pass again during the backward pass. By then the module has its
own parameters back, so the recomputed activations, and with them the gradients, would silently belong to other weights.
This file makes the recomputation use the substituted parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from mlo.errors import ConfigError
from mlo.ops import torch_versions
from mlo.ops.differentiable import with_current_operators

_LIBRARY = vars(torch.utils.checkpoint)


class Named(Protocol):
    """What gives tensors their names.

    Attributes:
        problem: the name of the problem whose module has them.
    """

    problem: str

    def named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The tensors by name."""


#: the modules that run at present, the innermost last, with the tensors that they run with
RUNNING: list[tuple[nn.Module, Named, Sequence[Tensor]]] = []


class Evaluation(Protocol):
    """An evaluation of a loss, which may checkpoint parts of itself, outside of all modules."""

    def repeatable(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which can run again after the evaluation."""

    def uncached(self) -> AbstractContextManager[None]:
        """A context in which nothing is taken from a cache: a repetition must save the same tensors."""


def recompute(evaluation: Evaluation) -> tuple[Any, Any]:
    """From now on, recompute checkpointed calls with the tensors in ``RUNNING``, until :func:`end`.

    It supports non-reentrant checkpointing. Reentrant checkpointing hides parameters from ``torch.autograd.grad``,
    which would treat them as unused; it raises a ConfigError.

    Args:
        evaluation: the present one.

    Returns:
        What :func:`end` takes. Both run at every evaluation, so they must be cheap.
    """
    outside = _LIBRARY[torch_versions.CHECKPOINT_ENTRY], _LIBRARY["CheckpointFunction"]
    _LIBRARY[torch_versions.CHECKPOINT_ENTRY], _LIBRARY["CheckpointFunction"] = (
        partial(_recorded, outside[0], evaluation),
        _Reentrant,
    )
    return outside


def end(outside: tuple[Any, Any]) -> None:
    """Recompute as before :func:`recompute`."""
    _LIBRARY[torch_versions.CHECKPOINT_ENTRY], _LIBRARY["CheckpointFunction"] = outside


def _recorded(
    outside: Callable[..., Any], evaluation: Evaluation, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Iterator[None]:
    """What torch's generator does; the function itself runs between its two parts."""
    if not torch_versions.CHECKPOINTS_FORWARD:
        _refuse_tangents(args, kwargs)
    if not RUNNING:
        with evaluation.uncached():
            yield from outside(with_current_operators(evaluation.repeatable(function)), *args, **kwargs)
        return
    module, names, tensors = RUNNING[-1]
    again = _Substituted(module, names.named(list(tensors)), function) if tensors else function
    yield from outside(with_current_operators(again), *args, **kwargs)


def _refuse_tangents(*arguments: Any) -> None:
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        who = f"problem {RUNNING[-1][1].problem!r}" if RUNNING else "a loss"
        raise ConfigError(
            f"{who} checkpoints activations, which have no forward derivative in torch {torch.__version__}; use "
            "another product than 'forward', such as 'exact', or torch 2.13 or later"
        )


class _Reentrant:
    @staticmethod
    def apply(*_: Any) -> Any:
        raise ConfigError(
            "reentrant activation checkpointing hides its parameters from torch.autograd.grad; call "
            "checkpoint(..., use_reentrant=False) in the module"
        )


class _Substituted:
    """A function that runs with ``tensors`` instead of the module's own."""

    def __init__(self, module: nn.Module, tensors: Mapping[str, Tensor], function: Callable[..., Any]) -> None:
        self._holder = _Holder(module, function)
        self._tensors = {f"module.{name}": tensor for name, tensor in tensors.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self._holder, self._tensors, args, kwargs, tie_weights=False)


class _Holder(nn.Module):
    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self._function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)
