"""Hypergradients by brute force, on any analytic problem: optimizer steps and solutions in one graph, without mlo."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import torch
from analytic import Quadratics
from torch import Tensor

import mlo

Slots = dict[str, Tensor]


def stepped(optimizer: torch.optim.Optimizer, value: Tensor, gradient: Tensor, state: Slots) -> tuple[Tensor, Slots]:
    """One step of an optimizer like the given one from ``value`` and ``state``, with its graph."""
    group = optimizer.param_groups[0]
    if isinstance(optimizer, torch.optim.SGD):
        return _sgd(group, value, gradient, state)
    options = {
        name: group[name] for name in inspect.signature(type(optimizer)).parameters if name in optimizer.defaults
    }
    moved = value.clone()
    moved.grad = gradient
    fresh = type(optimizer)([moved], **{**options, "differentiable": True})
    fresh.state[moved].update({name: slot.to(value.dtype, copy=True) for name, slot in state.items()})
    fresh.step()
    return moved, dict(fresh.state[moved])


def _sgd(group: Mapping[str, float], value: Tensor, gradient: Tensor, state: Slots) -> tuple[Tensor, Slots]:
    """By hand, as torch cuts the first momentum buffer out of the graph."""
    step = (-gradient if group["maximize"] else gradient) + group["weight_decay"] * value
    if not group["momentum"]:
        return value - group["lr"] * step, {}
    buffer = state.get("momentum_buffer")
    buffer = step if buffer is None else group["momentum"] * buffer + (1 - group["dampening"]) * step
    step = step + group["momentum"] * buffer if group["nesterov"] else buffer
    return value - group["lr"] * step, {"momentum_buffer": buffer}


def brute_force(
    made: Quadratics,
    stack: list[mlo.Problem],
    top: str,
    *,
    last: int | None = None,
    at_end: bool = False,
    inverse: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The gradient of ``top``'s loss through the next steps of the problems below it, lowest first.

    Args:
        last: how many of each problem's last steps are differentiated; None: all.
        at_end: whether a step's gradient is differentiated where the step leads, rather than where it is taken from.
        inverse: if given, no step is differentiated, but the solution t where the steps lead, by the implicit function
            theorem: dt = -inverse(Hessian) d(gradient).
    """
    start = {problem.name: problem.module.value.detach().clone().requires_grad_() for problem in stack}
    values = dict(start)
    for problem in stack[: list(start).index(top)]:
        name = problem.name
        if name in made.shape.tops:
            continue
        own, state = start[name].detach().requires_grad_(), problem.optimizer.state.get(problem.module.value, {})
        for left in reversed(range(problem.steps)):
            held = made.loss(name, {**values, name: own.detach()})  # by problems below, which read where it starts
            (inner,) = torch.autograd.grad(held, start[name], create_graph=True, allow_unused=True)
            gradient = made.slope(name, {**values, name: own})
            if inner is not None:
                gradient = gradient + (inner if made.shape.inner_path else inner.detach())
            if at_end:
                there = stepped(problem.optimizer, own, gradient, state)[0].detach().requires_grad_()
                slope = made.slope(name, {**values, name: there})
                gradient = gradient.detach() + slope - slope.detach()
            own, state = stepped(problem.optimizer, own, gradient, state)
            if inverse or (last is not None and left >= last):
                own, state = own.detach().requires_grad_(), {k: slot.detach() for k, slot in state.items()}
        if inverse:
            slope = made.slope(name, {**values, name: own})
            hessian = torch.stack([torch.autograd.grad(part, own, retain_graph=True)[0] for part in slope])
            own = own.detach() - inverse(hessian) @ (slope - slope.detach())
        values[name] = own
    return torch.autograd.grad(made.loss(top, values), start[top])[0]
