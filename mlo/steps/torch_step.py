"""A step by the user's own optimizer, run on copies: for every class of optimizer that has no formula here."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from mlo.levels.problem import Problem
from mlo.ops.vectors import filled
from mlo.steps.formulas import Gradients, NamedCotangents, Slots, Tensors
from mlo.steps.optimizer_state import COUNTERS, OptimizerState, copied


def step(
    problem: Problem,
    parameters: Tensors,
    gradients: Gradients,
    optimizer_state: OptimizerState,
    *,
    differentiable: bool,
) -> tuple[dict[str, Tensor], OptimizerState]:
    """The variables and the optimizer state after one step; with ``differentiable``, with a graph."""
    moved = {name: parameters[name].clone() for name in problem.variables}
    shadow = _shadow(problem, moved, gradients, optimizer_state, differentiable=differentiable)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if differentiable else default)  # for the counters that a first step creates
    try:
        type(problem.optimizer).step(shadow)
    finally:
        torch.set_default_dtype(default)
    slots = {name: dict(shadow.state[tensor]) for name, tensor in moved.items() if tensor in shadow.state}
    return moved, OptimizerState(optimizer_state.groups, slots)


def transpose(
    problem: Problem,
    parameters: Tensors,
    gradients: Gradients,
    optimizer_state: OptimizerState,
    cotangent: Tensors,
    slots: Slots | None,
) -> NamedCotangents:
    """See :func:`mlo.steps.formulas.transpose`. Without ``slots``, only cotangents of the gradients are computed."""
    leaves = {n: None if g is None else off_zero(g.detach()).requires_grad_() for n, g in gradients.items()}
    held, like = slots is None, tuple(cotangent.values())
    start = {n: parameters[n].detach().requires_grad_(not held) for n in cotangent}
    begun = {n: {k: _leaf(k, v, held) for k, v in s.items()} for n, s in optimizer_state.slots.items()}
    with torch.enable_grad():
        state = OptimizerState(optimizer_state.groups, begun)
        moved, after = step(problem, start, leaves, state, differentiable=True)
    pairs = [(moved[n], c) for n, c in cotangent.items()]
    pairs += [(after.slots[n][k], c) for n, s in (slots or {}).items() for k, c in s.items()]
    stepped, given = zip(*((o, c) for o, c in pairs if o.requires_grad), strict=True)
    keys = [(n, k) for n, s in begun.items() for k, v in s.items() if isinstance(v, Tensor) and v.requires_grad]
    inputs = [leaf for leaf in leaves.values() if leaf is not None]
    others = [] if held else [*start.values(), *(begun[n][k] for n, k in keys)]
    found = iter(torch.autograd.grad(stepped, [*inputs, *others], given, allow_unused=True))
    of_gradients = filled((None if leaves[n] is None else next(found) for n in cotangent), like)
    of_parameters = () if held else filled((next(found) for _ in cotangent), like)
    of_slots: dict[str, dict[str, Tensor]] = {}
    for (name, key), value in zip(keys, found, strict=True):
        if value is not None:
            of_slots.setdefault(name, {})[key] = value
    return dict(zip(cotangent, of_gradients, strict=True)), dict(zip(cotangent, of_parameters, strict=False)), of_slots


def _shadow(
    problem: Problem,
    parameters: Tensors,
    gradients: Gradients,
    optimizer_state: OptimizerState,
    *,
    differentiable: bool,
) -> Optimizer:
    """A copy of the problem's optimizer that updates ``parameters`` in place, from a copy of the optimizer state.

    It is copied from the instance instead of calling the class, because a user's subclass may take any arguments. The
    step hooks of the instance are left out, because they may refer to the real parameters.
    """
    optimizer = problem.optimizer
    shadow = object.__new__(type(optimizer))
    shadow.__dict__.update(vars(optimizer))
    shadow.__dict__.update(
        {hooks: OrderedDict() for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")}
    )
    substitutes = {id(problem.variables[n]): tensor for n, tensor in parameters.items() if gradients[n] is not None}
    flags = {"differentiable": True, "foreach": False, "fused": False, "capturable": False} if differentiable else {}
    shadow.param_groups = [
        {
            **hyperparameters,
            **{flag: value for flag, value in flags.items() if flag in hyperparameters},
            "params": [substitutes[id(p)] for p in group["params"] if id(p) in substitutes],
        }
        for hyperparameters, group in zip(optimizer_state.groups, optimizer.param_groups, strict=True)
    ]
    shadow.defaults = {**optimizer.defaults, **{f: v for f, v in flags.items() if f in optimizer.defaults}}
    shadow.state = defaultdict(dict)
    for name, tensor in parameters.items():
        if gradients[name] is not None:
            tensor.grad = gradients[name]
        if name in optimizer_state.slots:
            shadow.state[tensor] = {key: copied(value) for key, value in optimizer_state.slots[name].items()}
            for key in COUNTERS.intersection(optimizer_state.slots[name]) if differentiable else ():
                # a differentiable step computes 1 - beta^step with tensors; in float32 that would lose five digits
                if isinstance(value := shadow.state[tensor][key], Tensor):
                    shadow.state[tensor][key] = value.double()
    if differentiable and isinstance(shadow, SGD):
        _begin_momentum(shadow)
    return shadow


def _begin_momentum(shadow: SGD) -> None:
    """Set the momentum buffers of a first step such that the step is the same as torch's, and differentiable.

    Torch's SGD initializes the buffer with the gradient, but detached from the graph.
    """
    for group in shadow.param_groups:
        momentum, dampening = group["momentum"], group["dampening"]
        for parameter in group["params"] if momentum else ():
            if parameter.grad is not None and shadow.state[parameter].get("momentum_buffer") is None:
                sign = -1.0 if group["maximize"] else 1.0
                gradient = sign * parameter.grad + group["weight_decay"] * parameter
                shadow.state[parameter]["momentum_buffer"] = dampening / momentum * gradient


def off_zero(gradient: Tensor) -> Tensor:
    """The gradient with exact zeros replaced by a tiny number.

    Adaptive optimizers divide by the root of a mean square. At zero, autograd computes its derivative as infinity times
    zero, which is NaN. Next to zero the derivative is finite and correct.
    """
    nudge = torch.finfo(gradient.dtype).tiny ** 0.4
    return torch.where(gradient == 0, nudge, gradient)


def _leaf(key: str, value: Any, held: bool) -> Any:
    """A slot that requires gradients, unless it is ``held`` fixed or a counter."""
    if held or key in COUNTERS or not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().requires_grad_()
