"""One step of any torch.optim optimizer as a function of parameters, gradients and state, and its pullback."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from mlo.errors import ConfigError
from mlo.levels.problem import Problem
from mlo.ops.vectors import Vector, filled
from mlo.steps import adaptive, sgd
from mlo.steps.adaptive import Formula, Group, formula_of
from mlo.steps.clipping import clip, transpose_clip

Tensors = Mapping[str, Tensor]
Slots = Mapping[str, Mapping[str, Tensor]]
NamedCotangents = tuple[
    dict[str, Tensor], dict[str, Tensor], dict[str, dict[str, Tensor]]
]  # of gradients, variables, slots
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


def without_values(state: OptimizerState) -> OptimizerState:
    """The same hyperparameters, and for each slot an empty tensor: which there are, but not what they hold."""
    slots = {
        name: {key: value.new_empty(0) if isinstance(value, Tensor) else value for key, value in slot.items()}
        for name, slot in state.slots.items()
    }
    return OptimizerState(state.groups, slots)


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
        moved, after = _step(problem, parameters, clip(gradients, problem.clip_norm_now), at, differentiable=False)
    return {n: p.detach().requires_grad_() for n, p in moved.items()}, after


def differentiable_step(
    problem: Problem, parameters: Tensors, gradients: Mapping[str, Tensor | None], at: OptimizerState
) -> tuple[dict[str, Tensor], OptimizerState]:
    """Like :func:`virtual_step`, with the graph of all that it is given."""
    with torch.enable_grad():
        return _step(problem, parameters, clip(gradients, problem.clip_norm_now), at, differentiable=True)


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
    formula = formula_of(problem.optimizer, at.groups)
    if formula is not None:
        return _formula_step(problem, formula, parameters, gradients, at)
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


def _formula_step(
    problem: Problem, formula: Formula, parameters: Tensors, gradients: Mapping[str, Tensor | None], at: OptimizerState
) -> tuple[dict[str, Tensor], OptimizerState]:
    moved = {name: parameters[name] for name in problem.variables}
    slots = dict(at.slots)
    for part in _parts(problem, formula, parameters, gradients, at):
        stepped, state = adaptive.step(formula, part.group, part.counts, part.parameters, part.gradients, part.state)
        moved.update(zip(part.names, stepped, strict=True))
        counters = {count: torch.tensor(count, dtype=_counter_dtype()) for count in set(part.counts)}
        for index, (name, count) in enumerate(zip(part.names, part.counts, strict=True)):
            slots[name] = {"step": counters[count], **{key: tensors[index] for key, tensors in state.items()}}
    return {n: p.clone() if p is parameters[n] else p for n, p in moved.items()}, OptimizerState(at.groups, slots)


def _formula_pull(
    problem: Problem,
    formula: Formula,
    parameters: Tensors,
    gradients: Mapping[str, Tensor | None],
    at: OptimizerState,
    cotangent: Tensors,
    slots: Mapping[str, Mapping[str, Tensor]],
) -> NamedCotangents:
    """Cotangents of gradients, parameters and slots before a step, from those of parameters and slots after it."""
    to_gradients = {name: torch.zeros_like(c) for name, c in cotangent.items() if gradients[name] is None}
    to_parameters, to_slots = dict(cotangent), {name: dict(slot) for name, slot in slots.items()}
    for part in _parts(problem, formula, parameters, gradients, at):
        after = {
            key: [slots[n][key] if key in slots.get(n, {}) else torch.zeros_like(cotangent[n]) for n in part.names]
            for key in part.state
            if any(key in slots.get(name, {}) for name in part.names)
        }
        given = [cotangent[name] for name in part.names]
        found, before, state = adaptive.transpose(
            formula, part.group, part.counts, part.parameters, part.gradients, part.state, given, after
        )
        to_gradients.update(zip(part.names, found, strict=True))
        to_parameters.update(zip(part.names, before, strict=True))
        for index, name in enumerate(part.names):  # before the first step the state is zero, whatever came before
            to_slots[name] = {key: tensors[index] for key, tensors in state.items() if name in at.slots}
    return to_gradients, to_parameters, to_slots


@dataclass(frozen=True)
class _Part:
    """The variables of one parameter group that have a gradient, with the number of steps after this one."""

    group: Group
    names: list[str]
    counts: list[float]
    parameters: list[Tensor]
    gradients: list[Tensor]
    state: dict[str, list[Tensor]]


def _parts(
    problem: Problem, formula: Formula, parameters: Tensors, gradients: Mapping[str, Tensor | None], at: OptimizerState
) -> Iterator[_Part]:
    numbers = sgd.group_numbers(problem)
    for number, group in enumerate(at.groups):
        found = {n: g for n, g in gradients.items() if g is not None and numbers[n] == number}
        if not found:
            continue
        names = list(found)
        state = {
            key: [at.slots[n][key] if n in at.slots else torch.zeros_like(parameters[n]) for n in names]
            for key in formula.begin(group)
        }
        counters = {id(c): c for n in names if (c := at.slots.get(n, {}).get("step")) is not None}
        values = dict(zip(counters, torch.stack([*counters.values()]).tolist(), strict=True)) if counters else {}
        counts = [1.0 + values.get(id(at.slots.get(n, {}).get("step")), 0.0) for n in names]
        yield _Part(group, names, counts, [parameters[n] for n in names], list(found.values()), state)


def _counter_dtype() -> torch.dtype:
    return torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32


@dataclass(frozen=True)
class StepCotangents:
    """Cotangents of what a step was taken from; one tensor per variable, and {variable: {key: tensor}} of its slots."""

    gradient: Vector
    parameters: Vector
    slots: Mapping[str, Mapping[str, Tensor]]


def is_linear(problem: Problem) -> bool:
    """Whether a step's Jacobian depends neither on the gradient nor on the values in the optimizer's state."""
    return problem.clip_norm_now is None and sgd.applies(problem, problem.optimizer.param_groups)


@torch.no_grad()
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
    plain_sgd = sgd.applies(problem, at.groups)
    if plain_sgd and slots is None and problem.clip_norm_now is None:
        scales = sgd.scales(problem, at.groups, [n for n, g in gradients.items() if g is None], at.slots)
        return StepCotangents(tuple(c * scale for c, scale in zip(cotangent, scales, strict=True)), (), {})
    clipped, named = clip(gradients, problem.clip_norm_now), dict(zip(names, cotangent, strict=True))
    if plain_sgd:
        found = sgd.pull(problem, at.groups, clipped, at.slots, named, slots or {})
    elif formula := formula_of(problem.optimizer, at.groups):
        found = _formula_pull(problem, formula, parameters, clipped, at, named, slots or {})
    else:
        found = _general_pull(problem, parameters, clipped, at, named, slots)
    to_gradients = transpose_clip(gradients, problem.clip_norm_now, found[0])
    onto = tuple(to_gradients[name] for name in names)
    return StepCotangents(onto, () if slots is None else tuple(found[1][name] for name in names), found[2])


def _general_pull(
    problem: Problem,
    parameters: Tensors,
    gradients: Mapping[str, Tensor | None],
    at: OptimizerState,
    cotangent: Tensors,
    slots: Slots | None,
) -> NamedCotangents:
    """By running the optimizer's own step with a graph; without ``slots``, for the gradients alone."""
    leaves = {n: None if g is None else off_zero(g.detach()).requires_grad_() for n, g in gradients.items()}
    held = slots is None
    start = {n: parameters[n].detach().requires_grad_(not held) for n in cotangent}
    state = OptimizerState(at.groups, {n: {k: _leaf(k, v, held) for k, v in s.items()} for n, s in at.slots.items()})
    with torch.enable_grad():
        moved, after = _step(problem, start, leaves, state, differentiable=True)
    pairs = [(moved[n], c) for n, c in cotangent.items()]
    pairs += [(after.slots[n][k], c) for n, s in (slots or {}).items() for k, c in s.items()]
    stepped, given = zip(*((o, c) for o, c in pairs if o.requires_grad), strict=True)
    keys = [(n, k) for n, s in state.slots.items() for k, v in s.items() if isinstance(v, Tensor) and v.requires_grad]
    inputs = [leaf for leaf in leaves.values() if leaf is not None]
    others = [] if held else [*start.values(), *(state.slots[n][k] for n, k in keys)]
    found = iter(torch.autograd.grad(stepped, [*inputs, *others], given, allow_unused=True))
    like = tuple(cotangent.values())
    to_gradients = dict(
        zip(cotangent, filled((None if leaves[n] is None else next(found) for n in cotangent), like), strict=True)
    )
    to_parameters = {} if held else dict(zip(cotangent, filled((next(found) for _ in cotangent), like), strict=True))
    to_slots: dict[str, dict[str, Tensor]] = {}
    for (name, key), value in zip(keys, found, strict=True):
        if value is not None:
            to_slots.setdefault(name, {})[key] = value
    return to_gradients, to_parameters, to_slots


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
