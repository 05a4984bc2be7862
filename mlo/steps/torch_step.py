"""A step by the user's own optimizer, run on copies: for every class of optimizer that has no formula here."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import SGD, Adam, Optimizer

from mlo.levels.problem import Problem
from mlo.levels.state import COUNTERS, Slots
from mlo.ops import vectors
from mlo.ops.lost_graphs import LostGraphs
from mlo.ops.vectors import as_like, filled, real
from mlo.steps.formulas import Cotangents, Gradients, Group
from mlo.steps.own_step import check_graphs, check_unchanged, has_torch_step

NO_RATE = 1e-30  # moves no variable, and can be divided by


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
    if differentiable:
        gradients = [None if g is None else off_zero(g) for g in gradients]
        if isinstance(problem.optimizer, Adam):
            groups = [_with_a_rate(group) for group in groups]
    shadow = _shadow(problem, groups, moved, gradients, slots, differentiable=differentiable)
    own = not has_torch_step(problem.optimizer)
    slot_tensors = [value for slot in shadow.state.values() for value in slot.values() if isinstance(value, Tensor)]
    seen = LostGraphs([*moved, *gradients, *slot_tensors]) if own and differentiable else None
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if differentiable else default)  # for the counters that a first step creates
    try:
        with nullcontext() if seen is None else _copies_saved(), nullcontext() if seen is None else seen.follow():
            type(problem.optimizer).step(shadow)
    finally:
        torch.set_default_dtype(default)
    after: list[Mapping[str, Any]] = [dict(shadow.state[tensor]) if tensor in shadow.state else {} for tensor in moved]
    if own:
        check_unchanged(problem, shadow, groups)
    if seen is not None:
        check_graphs(problem, seen, moved, after)
    return moved, after


def _with_a_rate(group: Group) -> Group:
    """The group with a learning rate that is not 0: a differentiable Adam of torch divides by it."""
    rate = group["lr"]  # one on a GPU would have to be waited for
    zero = (not isinstance(rate, Tensor) or vectors.readable(rate)) and rate == 0
    return {**group, "lr": NO_RATE} if zero else group


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
    keys = [(i, k) for i, s in enumerate(begun) for k, v in s.items() if isinstance(v, Tensor) and v.requires_grad]
    inputs = [leaf for leaf in leaves if leaf is not None]
    others = [] if held else [*start, *(begun[i][k] for i, k in keys)]
    wanted = [*inputs, *others]
    found: Iterator[Any] = repeat(None, len(wanted))
    with torch.enable_grad():
        moved, after = step(problem, groups, start, leaves, begun, differentiable=True)
        pairs = [*zip(moved, cotangents, strict=True)]
        pairs += [(after[i][k], c) for i, given in enumerate(of_slots or ()) for k, c in given.items()]
        stepped = [(o, c) for o, c in pairs if o.requires_grad]
        if stepped:  # none, if it does not depend on the gradients
            outputs, given = zip(*stepped, strict=True)
            found = iter(torch.autograd.grad(outputs, wanted, given, allow_unused=True))
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
    shadow.__dict__.update({key: value for key, value in vars(optimizer).items() if key != "step"})
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
        _begin_momentum(shadow, has_torch_step(optimizer))
    return shadow


def _begin_momentum(shadow: SGD, torchs: bool) -> None:
    """Set the momentum buffers of a first step such that the step is the same as torch's, and differentiable.

    Torch's SGD initializes the buffer with the gradient, but detached from the graph. With dampening, a subclass is
    left to that (and is then refused), since it may change the gradient before.
    """
    for group in shadow.param_groups:
        momentum, dampening = group["momentum"], group["dampening"]
        for parameter in group["params"] if momentum and (torchs or not dampening) else ():
            if parameter.grad is not None and shadow.state[parameter].get("momentum_buffer") is None:
                sign = -1.0 if group["maximize"] else 1.0
                gradient = sign * parameter.grad + group["weight_decay"] * parameter
                shadow.state[parameter]["momentum_buffer"] = dampening / momentum * gradient


def _copies_saved() -> saved_tensors_hooks:
    """For a user's step, which may write into what its derivative needs, as ``p.copy_(p / p.norm())`` does."""
    return saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda tensor: tensor)


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
