"""One step of any torch.optim optimizer as a function of parameters, gradients and state, and its derivative."""

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
# scalars in optimizer states that depend only on the number of steps
COUNTERS = frozenset(("step", "mu_product", "eta", "mu"))


@dataclass(frozen=True)
class OptimizerState:
    """The state of a problem's optimizer before or after a step.

    Attributes:
        groups: the hyperparameters of each parameter group, with the learning rates that schedulers have set.
        slots: {parameter name: {key: value}}, the optimizer's state of each parameter, such as its momentum buffer.
    """

    groups: tuple[Mapping[str, Any], ...]
    slots: Mapping[str, Mapping[str, Any]]


def optimizer_state(problem: Problem, copies: bool = True) -> OptimizerState:
    """The current state of the problem's optimizer; its slots are copies, or the live tensors if not ``copies``."""
    optimizer = problem.optimizer
    groups = tuple({k: _copied(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups)
    slots = {
        name: {key: _copied(value) if copies else value for key, value in optimizer.state[parameter].items()}
        for name, parameter in problem.variables.items()
        if parameter in optimizer.state
    }
    return OptimizerState(groups, slots)


def moved_optimizer_state(optimizer_state: OptimizerState, device: torch.device | None) -> OptimizerState:
    """A copy on another device; counters stay on theirs."""
    slots = {
        name: {
            key: value.to(device) if isinstance(value, Tensor) and key not in COUNTERS else value
            for key, value in s.items()
        }
        for name, s in optimizer_state.slots.items()
    }
    return OptimizerState(optimizer_state.groups, slots)


def virtual_step(
    problem: Problem, parameters: Tensors, gradients: Mapping[str, Tensor | None], optimizer_state: OptimizerState
) -> tuple[dict[str, Tensor], OptimizerState]:
    """One optimizer step, without changing anything: the new variables, which require gradients, and the new state."""
    with torch.no_grad():
        moved, after = _step(problem, parameters, clip(problem, gradients), optimizer_state, differentiable=False)
    return {n: p.detach().requires_grad_() for n, p in moved.items()}, after


def differentiable_step(
    problem: Problem, parameters: Tensors, gradients: Mapping[str, Tensor | None], optimizer_state: OptimizerState
) -> tuple[dict[str, Tensor], OptimizerState]:
    """Like :func:`virtual_step`, but differentiable in parameters, gradients and optimizer state."""
    with torch.enable_grad():
        return _step(problem, parameters, clip(problem, gradients), optimizer_state, differentiable=True)


def _step(
    problem: Problem,
    parameters: Tensors,
    gradients: Mapping[str, Tensor | None],
    optimizer_state: OptimizerState,
    *,
    differentiable: bool,
) -> tuple[dict[str, Tensor], OptimizerState]:
    if sgd.applies(problem, optimizer_state.groups):
        moved, slots = sgd.step(
            sgd.hyperparameters(problem, optimizer_state.groups), parameters, gradients, optimizer_state.slots
        )
        return moved, OptimizerState(optimizer_state.groups, slots)
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


@dataclass(frozen=True)
class StepCotangents:
    """The cotangents of a step's inputs.

    Attributes:
        gradient: of the gradient, one tensor per variable.
        parameters: of the variables before the step, one tensor each.
        slots: of the optimizer's state before the step, {variable: {key: tensor}}.
    """

    gradient: Vector
    parameters: Vector
    slots: Mapping[str, Mapping[str, Tensor]]


def is_linear(problem: Problem) -> bool:
    """Whether the step is linear: its Jacobian does not depend on the values of gradient and optimizer state."""
    return problem.clip_norm_now is None and sgd.applies(problem, problem.optimizer.param_groups)


def pull_through_step(
    problem: Problem,
    parameters: Tensors,
    gradients: Mapping[str, Tensor | None],
    optimizer_state: OptimizerState,
    cotangent: Vector,
    slots: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> StepCotangents:
    """The transposed Jacobian of one optimizer step: from the cotangents of its results to those of its inputs.

    It includes all that the user's optimizer does (learning rate, momentum, Adam's scaling), and gradient clipping.

    Args:
        parameters, gradients, optimizer_state: the inputs of the step. If it :func:`is_linear`, only the presence of
            gradients and slots matters, not their values.
        cotangent: of the variables after the step, one tensor per variable of the problem, in their order.
        slots: cotangents of the optimizer's state after the step, {variable: {key: tensor}}. None: only the cotangent
            of the gradient is computed; parameters and state before the step are held fixed.
    """
    names = list(problem.variables)
    if is_linear(problem):
        if slots is None:
            scales = sgd.scales(
                problem, optimizer_state.groups, [n for n, g in gradients.items() if g is None], optimizer_state.slots
            )
            return StepCotangents(tuple(c * scale for c, scale in zip(cotangent, scales, strict=True)), (), {})
        named = dict(zip(names, cotangent, strict=True))
        of_gradient, of_parameters, of_slots = sgd.pull(
            problem, optimizer_state.groups, gradients, optimizer_state.slots, named, slots
        )
        return StepCotangents(tuple(of_gradient.values()), tuple(of_parameters.values()), of_slots)
    leaves = {n: None if g is None else off_zero(g.detach()).requires_grad_() for n, g in gradients.items()}
    held = slots is None
    start = {n: parameters[n].detach().requires_grad_(not held) for n in names}
    state = OptimizerState(
        optimizer_state.groups,
        {n: {k: _leaf(k, v, held) for k, v in s.items()} for n, s in optimizer_state.slots.items()},
    )
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
    """The gradients, scaled so that their joint Euclidean norm is at most ``problem.clip_norm_now``."""
    present = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    if problem.clip_norm_now is None or not present:
        return gradients
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in present.values()]))
    scale = (problem.clip_norm_now / (norm + 1e-6)).clamp(max=1.0)
    return {**gradients, **{name: gradient * scale for name, gradient in present.items()}}


def check_differentiable(problem: Problem) -> None:
    """Raise a ConfigError if torch cannot differentiate a step of the problem's optimizer."""
    if "differentiable" not in problem.optimizer.defaults:
        raise ConfigError(
            f"problem {problem.name!r}: a step of {type(problem.optimizer).__name__} cannot be differentiated (it has "
            "no option differentiable=True); use another optimizer, or pass hypergradient='cg', 'neumann' or "
            "'first_order', which do not differentiate optimizer steps"
        )


def _shadow(
    problem: Problem,
    parameters: Tensors,
    gradients: Mapping[str, Tensor | None],
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
            shadow.state[tensor] = {key: _copied(value) for key, value in optimizer_state.slots[name].items()}
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


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
