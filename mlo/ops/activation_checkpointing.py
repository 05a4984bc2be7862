"""Activation checkpointing under substituted parameters: what is recomputed sees what the forward pass saw.

Checkpointing runs a part of the forward pass again in the backward pass, when the module has its own parameters back;
the recomputed activations, and so the gradients, would silently be those of other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.utils.checkpoint
from torch import Tensor, nn
from torch.func import functional_call

from mlo.errors import ConfigError
from mlo.ops.differentiable import by_present_forms

_ENTRY = "_checkpoint_without_reentrant_generator_impl"


class RecomputingWith:
    """Inside, whatever non-reentrant checkpointing records will be recomputed with ``tensors`` in the module's place.

    Reentrant checkpointing hides parameters from ``torch.autograd.grad``, which would take them for unused; there it
    raises a ConfigError.
    """

    def __init__(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self._module = module
        self._tensors = tensors

    def __enter__(self) -> None:  # around every call of a module, so it is to cost next to nothing
        library = vars(torch.utils.checkpoint)
        self._outside = library[_ENTRY], library["CheckpointFunction"]
        library[_ENTRY], library["CheckpointFunction"] = self._recorded, _Reentrant

    def __exit__(self, *_: object) -> None:
        library = vars(torch.utils.checkpoint)
        library[_ENTRY], library["CheckpointFunction"] = self._outside

    def _recorded(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        within = _Within(self._module, self._tensors, function) if self._tensors else function
        return self._outside[0](by_present_forms(within), *args, **kwargs)


class _Reentrant:
    @staticmethod
    def apply(*_: Any) -> Any:
        raise ConfigError(
            "reentrant activation checkpointing hides its parameters from torch.autograd.grad; call "
            "checkpoint(..., use_reentrant=False) in the module"
        )


class _Within:
    """A function called with ``tensors`` in a module's place."""

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
