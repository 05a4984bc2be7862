"""Validates the arguments of Problem; each message says what to pass instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mlo.errors import ConfigError


def fault_of_name(name: object) -> list[str]:
    """Messages about an invalid name."""
    if isinstance(name, str) and name.isidentifier():
        return []
    return ["its name must be a Python identifier (letters, digits and _), because losses use it as a parameter name"]


def faults_of_parts(module: object, optimizer: object, scheduler: object) -> list[str]:
    """Messages about an invalid module, optimizer or scheduler."""
    faults = []
    if not isinstance(module, nn.Module):
        faults.append(f"module is a {type(module).__name__}; pass a torch.nn.Module")
    elif scripted := [name for name, part in module.named_modules() if isinstance(part, torch.jit.ScriptModule)]:
        which = f"its submodule {scripted[0]!r}" if scripted[0] else "module"
        faults.append(
            f"{which} is a ScriptModule, whose parameters cannot be substituted; pass the module it is made from"
        )
    if not isinstance(optimizer, Optimizer):
        faults.append(f"optimizer is a {type(optimizer).__name__}; pass a torch.optim optimizer")
    elif isinstance(optimizer, LBFGS):
        faults.append("LBFGS evaluates the loss several times per step, which is not supported; pass another optimizer")
    if scheduler is not None and not isinstance(scheduler, LRScheduler):
        faults.append(f"scheduler is a {type(scheduler).__name__}; pass a torch.optim.lr_scheduler scheduler")
    elif isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        faults.append(
            "ReduceLROnPlateau needs a validation metric, which is not available here; pass another scheduler"
        )
    elif scheduler is not None and scheduler.optimizer is not optimizer:
        faults.append("its scheduler is for another optimizer; construct it over the optimizer that you pass here")
    return faults


def faults_of_numbers(
    steps: object, steps_ahead: object, accumulate: object, warmup: object, clip_norm: object, autocast: object
) -> list[str]:
    """Messages about invalid step counts, clipping or autocast."""
    faults = []
    counts = {"steps": steps, "accumulate": accumulate} | ({} if steps_ahead is None else {"steps_ahead": steps_ahead})
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            faults.append(f"{name}={value!r}; pass a whole number, 1 or more")
    if type(warmup) is not int or warmup < 0:
        faults.append(f"warmup={warmup!r}; pass a whole number of rounds, 0 or more")
    if clip_norm is not None and not (isinstance(clip_norm, int | float) and clip_norm > 0):
        faults.append(f"clip_norm={clip_norm!r}; pass a number above 0, or None")
    if autocast not in (None, torch.bfloat16, torch.float16):
        faults.append(f"autocast={autocast!r}; pass torch.bfloat16, torch.float16, or None")
    return faults


def arguments_of(name: str, loss: Callable[..., object], renames: Mapping[str, str | None]) -> dict[str, str]:
    """{parameter of loss: name of the problem that it reads}, from the signature of loss."""
    parameters = list(inspect.signature(loss).parameters.values())
    if not parameters or parameters[0].kind not in (parameters[0].POSITIONAL_OR_KEYWORD, parameters[0].POSITIONAL_ONLY):
        raise ConfigError(f"problem {name!r}: write its loss as loss(self, batch, <problems that it reads>)")
    declared = {}
    for parameter in parameters[1:]:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(f"problem {name!r}: its loss takes {parameter}; write one named parameter per problem")
        read = renames.get(parameter.name, parameter.name)
        if read is not None:
            declared[parameter.name] = read
        elif parameter.default is parameter.empty:
            raise ConfigError(
                f"problem {name!r}: reads={{{parameter.name!r}: None}}, but that parameter of loss has no "
                f"default value; write loss(self, batch, ..., {parameter.name}=None)"
            )
    unknown = [key for key in renames if key not in {p.name for p in parameters[1:]}]
    if unknown:
        raise ConfigError(
            f"problem {name!r}: reads has {', '.join(map(repr, unknown))}, which is not a parameter of its "
            f"loss; its parameters are {', '.join(repr(p.name) for p in parameters[1:]) or 'the batch only'}"
        )
    return declared
