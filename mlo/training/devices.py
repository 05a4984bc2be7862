"""The device of an engine: chosen by name, checked, and problems moved to it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from mlo.errors import ConfigError
from mlo.levels.problem import Problem
from mlo.levels.validation import few
from mlo.ops import distributed


def known_device(device: str | torch.device) -> torch.device:
    """The device of this name; nothing is moved to it.

    Raises:
        ConfigError: if there is no device of this name, or it is not available.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:  # whose message lists all that torch was ever built for
        raise ConfigError(f"device={device!r} cannot be used: there is no device of this name; {DEVICES}") from error
    gpus = torch.cuda.device_count() if found.type == "cuda" else 0
    if found.type == "cuda" and (found.index or 0) >= gpus:
        built = "torch finds" if torch.backends.cuda.is_built() else "this build of torch cannot use them, so there are"
        count = f"{gpus or 'no'} CUDA GPU{'s' * (gpus != 1)}"
        last = f" to 'cuda:{gpus - 1}'" if gpus > 1 else ""
        there = f"pass 'cuda:0'{last}, or 'cpu'" if gpus else "pass 'cpu' or 'auto'"
        raise ConfigError(f"device={str(device)!r} cannot be used: {built} {count} here; {there}")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if found.type not in ("cpu", "cuda") and (
        accelerator is None or found.type != accelerator.type or (found.index or 0) >= torch.accelerator.device_count()
    ):
        raise ConfigError(f"device={str(device)!r} cannot be used: there is no such device here; {DEVICES}")
    return found


DEVICES = "pass 'cpu', 'cuda' or 'cuda:1' for a GPU, or 'auto' for a GPU if there is one"


def move_to(problems: Sequence[Problem], device: str | torch.device) -> torch.device:
    """Move modules, optimizer states and data streams to ``device``; "auto" is a CUDA GPU if there is one.

    In a distributed run each process has its own GPU, and all start with the parameters and buffers of the first one.

    Returns:
        The device, with an index.

    Raises:
        ConfigError: if the device is not available.
    """
    try:
        target = torch.empty(0, device=distributed.own_device(known_device(device))).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={device!r} cannot be used ({error}); {DEVICES}") from error
    for problem in problems:
        _refuse_meta(problem)
        problem.module.to(target)
        for slots in problem.optimizer.state.values():
            for key, value in slots.items():
                if isinstance(value, torch.Tensor) and not (key == "step" and value.device.type == "cpu"):
                    slots[key] = value.to(target)
        problem.stream.device = target
        if target.type == "cuda":
            warn_of_masks(problem)
        distributed.follow_main([*problem.module.parameters(), *problem.module.buffers()])
    return target


def _refuse_meta(problem: Problem) -> None:
    tensors = [*problem.module.named_parameters(), *problem.module.named_buffers()]
    meta = [name for name, tensor in tensors if tensor.device.type == "meta"]
    if meta:
        raise ConfigError(
            f"problem {problem.name!r}: tensors of its module are on the meta device, without values ({few(meta)}); "
            "call module.to_empty(device='cpu') and initialize or load them before you make the optimizer"
        )


def warn_of_masks(problem: Problem) -> None:
    """Warn of recurrent layers with dropout: cuDNN has random state of its own, which cannot be set back."""
    for name, layer in problem.module.named_modules():
        if isinstance(layer, nn.RNNBase) and layer.num_layers > 1 and layer.dropout > 0:
            warnings.warn(
                f"problem {problem.name!r}: the dropout between the layers of {name or 'its module'!r} cannot be "
                "repeated on a GPU, so evaluations of one step differ, and hypergradients in training mode are wrong; "
                "use single layers with nn.Dropout between them",
                stacklevel=4,
            )
