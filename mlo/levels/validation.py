"""Validates the arguments of Problem; each message says what to pass instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
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
    else:
        faults += faults_of_module(module)
    if not isinstance(optimizer, Optimizer):
        faults.append(f"optimizer is a {type(optimizer).__name__}; pass a torch.optim optimizer")
    elif "_optimizer_step_pre_hooks" not in vars(optimizer):
        faults.append(
            f"{type(optimizer).__name__} does not call super().__init__(params, defaults) of torch.optim.Optimizer; "
            "call it, or, if it wraps another optimizer, make it a subclass of that"
        )
    elif isinstance(optimizer, LBFGS):
        faults.append("LBFGS evaluates the loss several times per step, which is not supported; pass another optimizer")
    elif any(group.get("differentiable") for group in optimizer.param_groups):
        faults.append(
            "its optimizer has differentiable=True, with which torch cannot step parameters that require gradients; "
            "leave it out: steps are differentiated without it"
        )
    if scheduler is not None and not isinstance(scheduler, LRScheduler):
        faults.append(f"scheduler is a {type(scheduler).__name__}; pass a torch.optim.lr_scheduler scheduler")
    elif isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        faults.append(
            "ReduceLROnPlateau needs a validation metric, which is not available here; pass another scheduler"
        )
    elif scheduler is not None and scheduler.optimizer is not optimizer:
        faults.append("its scheduler is for another optimizer; construct it over the optimizer that you pass here")
    return faults


def faults_of_module(module: nn.Module) -> list[str]:
    """Messages about a module that cannot be run with other tensors in the places of its own."""
    faults, parts = [], dict(module.named_modules())
    for name, part in parts.items():
        if isinstance(part, torch.jit.ScriptModule) and [*part.parameters(), *part.buffers()]:
            return [
                f"{_module(name)} is a ScriptModule of torch.jit, in which parameters cannot be replaced; pass the "
                "Python module that it was made from (Engine(compile=True) compiles it)"
            ]
        wrapper = next((kind.__name__ for kind in type(part).__mro__ if kind.__name__ in _WRAPPERS), None)
        if wrapper and not (wrapper == "DataParallel" and len(part.device_ids) < 2):  # which only calls its module
            faults.append(
                f"{_module(name)} is a {wrapper}, which distributes its work by itself; pass the module inside it "
                "(under torchrun, the engine averages the gradients of all processes)"
            )
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    lazy = [name for name, tensor in tensors.items() if is_lazy(tensor)]
    if lazy:
        faults.append(
            f"its module has lazy layers without a shape yet ({few(lazy)}); run the model once on a batch before you "
            "make the optimizer"
        )
    return faults + ([] if lazy else [*_shared(dict(module.named_parameters()), dict(module.named_buffers()))])


def _shared(parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Iterator[str]:
    """A message about a trainable parameter that shares its memory with another tensor, as far as can be seen."""
    spans = []
    for name, tensor in [*parameters.items(), *buffers.items()]:
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta
        if plain and tensor.is_contiguous() and tensor.numel():
            begin = tensor.data_ptr()
            trained = name in parameters and tensor.requires_grad
            spans.append((begin, begin + tensor.numel() * tensor.element_size(), name, trained))
    spans.sort()
    for (_, end, one, some), (begin, _, other, more) in pairwise(spans):
        if begin < end and (some or more):
            first, second = (one, other) if some else (other, one)
            yield (
                f"the parameter {first!r} of its module shares its memory with {second!r}, which is another tensor "
                "(as after .data), so virtual steps would move only one of them; use the parameter itself in both "
                "places (self.b.weight = self.a.weight), or a copy (.clone())"
            )
            return


def _module(name: str) -> str:
    return f"the part {name!r} of its module" if name else "its module"


def few(names: Sequence[str]) -> str:
    """The first names."""
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")


_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FSDPModule", "FullyShardedDataParallel")


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
