"""Activation checkpointing under substituted parameters: what is recomputed sees what the forward pass saw.

Checkpointing runs a part of the forward pass again in the backward pass, when the module has its own parameters back;
the recomputed activations, and so the gradients, would silently be those of other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.utils.checkpoint
from torch import Tensor, nn
from torch.func import functional_call

from mlo.errors import ConfigError

_ENTRY = "_checkpoint_without_reentrant_generator_impl"


@contextmanager
def recomputing_with(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, whatever non-reentrant checkpointing records will be recomputed with ``tensors`` in the module's place.

    Reentrant checkpointing hides parameters from ``torch.autograd.grad``, which would take them for unused; there it
    raises a ConfigError.
    """
    library = torch.utils.checkpoint
    entry = getattr(library, _ENTRY)

    def patched(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return entry(_Within(module, tensors, function) if tensors else function, *args, **kwargs)

    inside = {_ENTRY: patched, "CheckpointFunction": _Reentrant}
    outside = {name: getattr(library, name) for name in inside}
    for name, value in inside.items():
        setattr(library, name, value)
    try:
        yield
    finally:
        for name, value in outside.items():
            setattr(library, name, value)


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
