"""A step by the user's own optimizer, run on copies: for every class of optimizer that has no formula here."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from mlo.levels.problem import Problem
from mlo.levels.state import COUNTERS, Slots
from mlo.ops import vectors
from mlo.ops.vectors import as_like, filled, real
from mlo.steps.formulas import Cotangents, Gradients, Group


def step(
    problem: Problem,
    groups: Sequence[Group],
    variables: Sequence[Tensor],
    gradients: Gradients,
    slots: Slots,
    *,
    differentiable: bool,
) -> tuple[list[Tensor], list[Mapping[str, Any]]]:
    """The variables and the optimizer's slots after one step; with ``differentiable``, with a graph."""
    moved = [variable.clone() for variable in variables]
    still: list[int] = []
    if differentiable:
        gradients = [None if g is None else off_zero(g) for g in gradients]
        if isinstance(problem.optimizer, Adam):
            groups, still = _with_a_rate(groups, problem.group_numbers)
    shadow = _shadow(problem, groups, moved, gradients, slots, differentiable=differentiable)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if differentiable else default)  # for the counters that a first step creates
    try:
        type(problem.optimizer).step(shadow)
    finally:
        torch.set_default_dtype(default)
    after: list[Mapping[str, Any]] = [dict(shadow.state[tensor]) if tensor in shadow.state else {} for tensor in moved]
    for index in still:
        moved[index] = variables[index] + 0.0 * moved[index]
    return moved, after


def _with_a_rate(groups: Sequence[Group], numbers: Sequence[int]) -> tuple[Sequence[Group], list[int]]:
    """The groups with a learning rate other than 0, by which a differentiable Adam of torch divides.

    Also returned are the positions of the variables whose rate is 0. They do not move, whatever the gradient is.
    """
    rates = [group["lr"] for group in groups]  # one on a GPU would have to be waited for
    zero = [i for i, r in enumerate(rates) if (not isinstance(r, Tensor) or vectors.readable(r)) and r == 0]
    found = [{**group, "lr": 1.0} if i in zero else group for i, group in enumerate(groups)]
    return found, [index for index, number in enumerate(numbers) if number in zero]


def transpose(
    problem: Problem,
    groups: Sequence[Group],
    variables: Sequence[Tensor],
    gradients: Gradients,
    slots: Slots,
    cotangents: Sequence[Tensor],
    of_slots: Sequence[Mapping[str, Tensor]] | None,
) -> Cotangents:
    """As :func:`mlo.steps.formulas.transpose`, with slots from before the step."""
    leaves = [None if g is None else g.detach().requires_grad_() for g in gradients]
    held = of_slots is None
    start = [variable.detach().requires_grad_(not held) for variable in variables]
    begun = tuple([{k: _leaf(k, v, held) for k, v in slot.items()} for slot in slots])
    with torch.enable_grad():
        moved, after = step(problem, groups, start, leaves, begun, differentiable=True)
    pairs = [*zip(moved, cotangents, strict=True)]
    pairs += [(after[i][k], c) for i, given in enumerate(of_slots or ()) for k, c in given.items()]
    stepped, given = zip(*((o, c) for o, c in pairs if o.requires_grad), strict=True)
    keys = [(i, k) for i, s in enumerate(begun) for k, v in s.items() if isinstance(v, Tensor) and v.requires_grad]
    inputs = [leaf for leaf in leaves if leaf is not None]
    others = [] if held else [*start, *(begun[i][k] for i, k in keys)]
    found = iter(torch.autograd.grad(stepped, [*inputs, *others], given, allow_unused=True))
    of_gradients = filled((None if leaf is None else next(found) for leaf in leaves), cotangents)
    of_variables = () if held else filled((next(found) for _ in cotangents), cotangents)
    to_slots: list[dict[str, Tensor]] = [] if held else [{} for _ in slots]
    for (index, key), value in zip(keys, found, strict=True):
        if value is not None:
            to_slots[index][key] = value
    return of_gradients, of_variables, to_slots


def _shadow(
    problem: Problem,
    groups: Sequence[Group],
    variables: Sequence[Tensor],
    gradients: Gradients,
    slots: Slots,
    *,
    differentiable: bool,
) -> Optimizer:
    """A copy of the problem's optimizer that updates ``variables`` in place, from a copy of the slots.

    It is copied from the instance instead of calling the class, because a user's subclass may take any arguments. The
    step hooks of the instance are left out, because they may refer to the real parameters.
    """
    optimizer = problem.optimizer
    shadow = object.__new__(type(optimizer))
    shadow.__dict__.update(vars(optimizer))
    shadow.__dict__.update(
        {hooks: OrderedDict() for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")}
    )
    own = [*problem.variables.values()]
    substitutes = {id(p): t for p, t, g in zip(own, variables, gradients, strict=True) if g is not None}
    flags = {"differentiable": True, "foreach": False, "fused": False, "capturable": False} if differentiable else {}
    shadow.param_groups = [
        {
            **hyperparameters,
            **{flag: value for flag, value in flags.items() if flag in hyperparameters},
            "params": [substitutes[id(p)] for p in group["params"] if id(p) in substitutes],
        }
        for hyperparameters, group in zip(groups, optimizer.param_groups, strict=True)
    ]
    shadow.defaults = {**optimizer.defaults, **{f: v for f, v in flags.items() if f in optimizer.defaults}}
    shadow.state = defaultdict(dict)
    for tensor, gradient, slot in zip(variables, gradients, slots, strict=True):
        if gradient is not None:
            tensor.grad = gradient
        if slot:
            shadow.state[tensor] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in slot.items()}
            for key in COUNTERS.intersection(slot) if differentiable else ():
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
    """The gradient with a tiny number added to exact zeros.

    Adaptive optimizers divide by the root of a mean square. At zero, autograd computes its derivative as infinity times
    zero, which is NaN. Next to zero the derivative is finite and correct.
    """
    nudge = torch.finfo(gradient.dtype).tiny ** 0.4
    zeros = (real(gradient.detach()) == 0).to(real(gradient).dtype)
    return gradient.add(as_like(gradient, zeros), alpha=nudge)


def _leaf(key: str, value: Any, held: bool) -> Any:
    """A slot that requires gradients, unless it is ``held`` fixed or a counter."""
    if (
        held
        or key in COUNTERS
        or not isinstance(value, Tensor)
        or not (value.is_floating_point() or value.is_complex())
    ):
        return value
    return value.detach().requires_grad_()
