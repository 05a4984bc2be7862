"""One step of any torch.optim optimizer as a function of parameters, gradients and state, and its pullback."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from mlo.errors import ConfigError
from mlo.levels.problem import Problem
from mlo.ops.vectors import Vector, filled
from mlo.steps import sgd

Tensors = Mapping[str, Tensor]
COUNTERS = frozenset(("step", "mu_product", "eta", "mu"))  # scalars in a state that only the number of steps moves


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer at one moment.

    Attributes:
        groups: the hyperparameters of each parameter group, as schedulers have set them by then.
        slots: {parameter name: its state}, momentum and the like.
    """

    groups: tuple[Mapping[str, Any], ...]
    slots: Mapping[str, Mapping[str, Any]]


def optimizer_state(problem: Problem, copies: bool = True) -> OptimizerState:
    """The present state of the problem's optimizer; its slots are the live ones unless they are ``copies``."""
    optimizer = problem.optimizer
    groups = tuple({k: _copied(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups)
    slots = {
        name: {key: _copied(value) if copies else value for key, value in optimizer.state[parameter].items()}
        for name, parameter in problem.variables.items()
        if parameter in optimizer.state
    }
    return OptimizerState(groups, slots)


def moved_optimizer_state(at: OptimizerState, device: torch.device | None) -> OptimizerState:
    """A copy on another device; counters stay where they are."""
    slots = {
        name: {
            key: value.to(device) if isinstance(value, Tensor) and key not in COUNTERS else value
            for key, value in s.items()
        }
        for name, s in at.slots.items()
    }
    return OptimizerState(at.groups, slots)


def virtual_step(
    problem: Problem, parameters: Tensors, gradients: Mapping[str, Tensor | None], at: OptimizerState
) -> tuple[dict[str, Tensor], OptimizerState]:
    """The optimizer's step from ``parameters`` and ``at``, without touching either; returns what it leads to."""
    with torch.no_grad():
        moved, after = _step(problem, parameters, clip(problem, gradients), at, differentiable=False)
    return {n: p.detach().requires_grad_() for n, p in moved.items()}, after


def differentiable_step(
    problem: Problem, parameters: Tensors, gradients: Mapping[str, Tensor | None], at: OptimizerState
) -> tuple[dict[str, Tensor], OptimizerState]:
    """Like :func:`virtual_step`, with the graph of all that it is given."""
    with torch.enable_grad():
        return _step(problem, parameters, clip(problem, gradients), at, differentiable=True)


def _step(
    problem: Problem,
    parameters: Tensors,
    gradients: Mapping[str, Tensor | None],
    at: OptimizerState,
    *,
    differentiable: bool,
) -> tuple[dict[str, Tensor], OptimizerState]:
    if sgd.applies(problem, at.groups):
        moved, slots = sgd.step(sgd.hyperparameters(problem, at.groups), parameters, gradients, at.slots)
        return moved, OptimizerState(at.groups, slots)
    moved = {name: parameters[name].clone() for name in problem.variables}
    shadow = _shadow(problem, moved, gradients, at, differentiable=differentiable)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if differentiable else default)  # of counters that a first step begins
    try:
        type(problem.optimizer).step(shadow)
    finally:
        torch.set_default_dtype(default)
    slots = {name: dict(shadow.state[tensor]) for name, tensor in moved.items() if tensor in shadow.state}
    return moved, OptimizerState(at.groups, slots)


@dataclass(frozen=True)
class StepCotangents:
    """Cotangents of what a step was taken from; one tensor per variable, and {variable: {key: tensor}} of its slots."""

    gradient: Vector
    parameters: Vector
    slots: Mapping[str, Mapping[str, Tensor]]


def is_linear(problem: Problem) -> bool:
    """Whether a step's Jacobian depends neither on the gradient nor on the values in the optimizer's state."""
    return problem.clip_norm_now is None and sgd.applies(problem, problem.optimizer.param_groups)


def pull_through_step(
    problem: Problem,
    parameters: Tensors,
    gradients: Mapping[str, Tensor | None],
    at: OptimizerState,
    cotangent: Vector,
    slots: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> StepCotangents:
    """One step, transposed: cotangents of what it was taken from, from those of what it led to.

    It is the Jacobian of the user's own optimizer step (learning rate, momentum, Adam's scaling), gradient clipping
    included.

    Args:
        parameters, gradients, at: what the step was taken from; where it :func:`is_linear`, only which
            gradients and slots there are counts.
        cotangent: of the parameters after the step, one tensor per variable of the problem, in their order.
        slots: cotangents of the optimizer's state after the step; None: of the gradient alone is asked, with
            parameters and state before the step held fixed, and theirs are not to be used.
    """
    names = list(problem.variables)
    if is_linear(problem):
        if slots is None:
            scales = sgd.scales(problem, at.groups, [n for n, g in gradients.items() if g is None], at.slots)
            return StepCotangents(tuple(c * scale for c, scale in zip(cotangent, scales, strict=True)), (), {})
        named = dict(zip(names, cotangent, strict=True))
        of_gradient, of_parameters, of_slots = sgd.pull(problem, at.groups, gradients, at.slots, named, slots)
        return StepCotangents(tuple(of_gradient.values()), tuple(of_parameters.values()), of_slots)
    leaves = {n: None if g is None else off_zero(g.detach()).requires_grad_() for n, g in gradients.items()}
    held = slots is None
    start = {n: parameters[n].detach().requires_grad_(not held) for n in names}
    state = OptimizerState(at.groups, {n: {k: _leaf(k, v, held) for k, v in s.items()} for n, s in at.slots.items()})
    moved, after = differentiable_step(problem, start, leaves, state)
    pairs = list(zip(moved.values(), cotangent, strict=True))
    pairs += [(after.slots[n][k], c) for n, s in (slots or {}).items() for k, c in s.items()]
    stepped, given = zip(*((o, c) for o, c in pairs if o.requires_grad), strict=True)
    keys = [(n, k) for n, s in state.slots.items() for k, v in s.items() if isinstance(v, Tensor) and v.requires_grad]
    inputs = [leaf for leaf in leaves.values() if leaf is not None]
    others = [] if held else [*start.values(), *(state.slots[n][k] for n, k in keys)]
    found = iter(torch.autograd.grad(stepped, [*inputs, *others], given, allow_unused=True))
    gradient = filled((None if leaves[n] is None else next(found) for n in names), cotangent)
    if held:
        return StepCotangents(gradient, (), {})
    before = filled((next(found) for _ in names), cotangent)
    pulled: dict[str, dict[str, Tensor]] = {}
    for (name, key), value in zip(keys, found, strict=True):
        if value is not None:
            pulled.setdefault(name, {})[key] = value
    return StepCotangents(gradient, before, pulled)


def clip(problem: Problem, gradients: Mapping[str, Tensor | None]) -> Mapping[str, Tensor | None]:
    """The gradients, scaled down together so that their norm is at most the problem's ``clip_norm_now``."""
    present = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    if problem.clip_norm_now is None or not present:
        return gradients
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in present.values()]))
    scale = (problem.clip_norm_now / (norm + 1e-6)).clamp(max=1.0)
    return {**gradients, **{name: gradient * scale for name, gradient in present.items()}}


def check_differentiable(problem: Problem) -> None:
    """Raise a ConfigError unless torch can differentiate the step of the problem's optimizer."""
    if "differentiable" not in problem.optimizer.defaults:
        raise ConfigError(
            f"problem {problem.name!r}: a step of {type(problem.optimizer).__name__} cannot be differentiated (it has "
            "no differentiable=True); give the problem hypergradient='cg', 'neumann' or 'first_order', which do not "
            "differentiate the step, or another optimizer"
        )


def _shadow(
    problem: Problem,
    parameters: Tensors,
    gradients: Mapping[str, Tensor | None],
    at: OptimizerState,
    *,
    differentiable: bool,
) -> Optimizer:
    """A copy of the problem's optimizer that steps ``parameters``, in place, from a copy of the state ``at``.

    It is made from the instance, not by calling its class: a user's subclass may take any arguments. The hooks of the
    instance's step are left out: they may hold on to the real parameters.
    """
    optimizer = problem.optimizer
    shadow = object.__new__(type(optimizer))
    shadow.__dict__.update(vars(optimizer))
    shadow.__dict__.update(
        {hooks: OrderedDict() for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")}
    )
    stand_in = {id(problem.variables[n]): tensor for n, tensor in parameters.items() if gradients[n] is not None}
    flags = {"differentiable": True, "foreach": False, "fused": False, "capturable": False} if differentiable else {}
    shadow.param_groups = [
        {
            **hyperparameters,
            **{flag: value for flag, value in flags.items() if flag in hyperparameters},
            "params": [stand_in[id(p)] for p in group["params"] if id(p) in stand_in],
        }
        for hyperparameters, group in zip(at.groups, optimizer.param_groups, strict=True)
    ]
    shadow.defaults = {**optimizer.defaults, **{f: v for f, v in flags.items() if f in optimizer.defaults}}
    shadow.state = defaultdict(dict)
    for name, tensor in parameters.items():
        if gradients[name] is not None:
            tensor.grad = gradients[name]
        if name in at.slots:
            shadow.state[tensor] = {key: _copied(value) for key, value in at.slots[name].items()}
            for key in COUNTERS.intersection(at.slots[name]) if differentiable else ():
                # a differentiable step computes 1 - beta^step as tensors, where float32 loses five digits
                if isinstance(value := shadow.state[tensor][key], Tensor):
                    shadow.state[tensor][key] = value.double()
    if differentiable and isinstance(shadow, SGD):
        _begin_momentum(shadow)
    return shadow


def _begin_momentum(shadow: SGD) -> None:
    """Give parameters at their first step a momentum buffer by which that step comes out as torch takes it.

    Torch's SGD takes the first buffer to be the gradient itself, but cut out of the graph.
    """
    for group in shadow.param_groups:
        momentum, dampening = group["momentum"], group["dampening"]
        for parameter in group["params"] if momentum else ():
            if parameter.grad is not None and shadow.state[parameter].get("momentum_buffer") is None:
                sign = -1.0 if group["maximize"] else 1.0
                gradient = sign * parameter.grad + group["weight_decay"] * parameter
                shadow.state[parameter]["momentum_buffer"] = dampening / momentum * gradient


def off_zero(gradient: Tensor) -> Tensor:
    """The gradient with exact zeros moved off by a square root of the smallest number's order.

    Adaptive steps divide by the root of a mean square, whose derivative at zero autograd takes as infinity times
    zero; just beside zero it is finite, and what it should be.
    """
    nudge = torch.finfo(gradient.dtype).tiny ** 0.4
    return torch.where(gradient == 0, nudge, gradient)


def _leaf(key: str, value: Any, held: bool) -> Any:
    """A slot to be differentiated for; counters are no variables."""
    if held or key in COUNTERS or not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().requires_grad_()


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
