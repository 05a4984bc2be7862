"""The formulas of torch's SGD (momentum, dampening, Nesterov, weight decay) and their transpose.

Most lower levels use SGD. The general way (:mod:`mlo.steps.torch_step`) runs the user's optimizer on copies, which
takes several passes over the weights. These formulas give the same bits for the cost of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from mlo.ops.vectors import chunks
from mlo.steps.own_step import has_torch_step

_FUSED = itemgetter("fused")

Group = Mapping[str, Any]
Slots = Sequence[Mapping[str, Any]]
Gradients = Sequence[Tensor | None]
Tensors = list[Tensor] | tuple[Tensor, ...]


def applies(optimizer: Optimizer, groups: Sequence[Group]) -> bool:
    """Whether the optimizer is torch's own SGD, unfused."""
    return type(optimizer) is SGD and has_torch_step(optimizer) and not any(map(_FUSED, groups))


def by_numbers(groups: Sequence[Group]) -> bool:
    """Whether all learning rates are numbers, not tensors."""
    return not any(map(_by_tensor, groups))


def _by_tensor(group: Group) -> bool:
    return isinstance(group["lr"], Tensor)


def step(
    groups: Sequence[Group],
    numbers: Sequence[int],
    variables: Sequence[Tensor],
    gradients: Gradients,
    slots: Slots,
) -> tuple[list[Tensor], list[Mapping[str, Any]]]:
    """The variables and slots after one step, as in :class:`torch.optim.SGD`; differentiable in all tensors.

    With gradient g, variable w and momentum buffer b: g <- g + weight_decay * w, b <- momentum * b +
    (1 - dampening) * g (at the first step b <- g), then w <- w - lr * b, or w <- w - lr * (g + momentum * b) with
    Nesterov, or w <- w - lr * g without momentum. With maximize, g is the negative gradient.

    Args:
        groups: the hyperparameters of each parameter group; the learning rate may be a tensor.
        numbers: the group of each variable.
        variables: before the step.
        gradients: a variable whose gradient is None does not change.
        slots: of each variable, {"momentum_buffer": tensor or None} or {}.
    """
    moved = [v.clone() if g is None else v for v, g in zip(variables, gradients, strict=True)]
    after: list[Mapping[str, Any]] = [*slots]
    for number, began, indices in _together(numbers, gradients, slots, variables):
        group, own = groups[number], [variables[index] for index in indices]
        along: Tensors = [g for g in map(gradients.__getitem__, indices) if g is not None]
        if group["maximize"]:
            along = _scaled(along, -1.0)
        if group["weight_decay"]:
            along = _add(along, own, group["weight_decay"])
        buffers: Tensors = ()
        if momentum := group["momentum"]:
            if began:
                last = _scaled([slots[index]["momentum_buffer"] for index in indices], momentum)
                buffers = _add(last, along, 1 - group["dampening"])
            else:
                buffers = [tensor.clone() for tensor in along]
            along = _add(along, buffers, momentum) if group["nesterov"] else buffers
        rate = group["lr"]
        stepped = _add(own, _scaled(along, rate), -1.0) if _by_tensor(group) else _add(own, along, -rate)
        for row, index in enumerate(indices):
            moved[index] = stepped[row]
            after[index] = {"momentum_buffer": buffers[row]} if momentum else {}
    return moved, after


def _add(a: Tensors, b: Tensors, scale: float) -> Tensors:
    """``a + scale * b``; in a graph one by one, since operators on lists keep what their derivatives do not need."""
    if torch.is_grad_enabled():
        return [torch.add(one, other, alpha=scale) for one, other in zip(a, b, strict=True)]
    return torch._foreach_add(a, b, alpha=scale)


def _scaled(a: Tensors, scale: float | Tensor) -> Tensors:
    if isinstance(scale, Tensor) and torch.is_grad_enabled():
        return [scale.to(one.dtype) * one for one in a]
    if isinstance(scale, Tensor):  # a tensor without dimensions would take the dtype of the scale
        return [after.to(before.dtype) for after, before in zip(torch._foreach_mul(a, scale), a, strict=True)]
    return [one * scale for one in a] if torch.is_grad_enabled() else torch._foreach_mul(a, scale)


def _together(
    numbers: Sequence[int], gradients: Gradients, slots: Slots, tensors: Sequence[Tensor]
) -> Iterator[tuple[int, bool, list[int]]]:
    """The variables with a gradient, by position, where they step alike: (group, whether momentum has begun, some)."""
    found: dict[tuple[int, bool], list[int]] = {}
    for index, (number, gradient, slot) in enumerate(zip(numbers, gradients, slots, strict=True)):
        if gradient is not None:
            found.setdefault((number, slot.get("momentum_buffer") is not None), []).append(index)
    for (number, began), indices in found.items():
        # in a graph, everything is kept anyway
        for part in [indices] if torch.is_grad_enabled() else chunks(indices, tensors):
            yield number, began, part


def scales(of: Iterable[Group], unreached: Collection[int], slots: Slots) -> list[float | Tensor]:
    """For each variable, the derivative of its new value with respect to its gradient, which is a single number.

    Args:
        of: the hyperparameters of each variable's group.
        unreached: the positions of variables that had no gradient.
        slots: before the step.
    """
    found: list[float | Tensor] = []
    for index, group in enumerate(of):
        scale = group["lr"] if group["maximize"] else -group["lr"]
        if momentum := group["momentum"]:
            first = slots[index].get("momentum_buffer") is None
            share = 1.0 if first else 1.0 - group["dampening"]
            scale = scale * (1.0 + momentum * share if group["nesterov"] else share)
        found.append(0.0 if index in unreached else scale)
    return found


def transpose(
    groups: Sequence[Group],
    numbers: Sequence[int],
    gradients: Gradients,
    slots: Slots,
    cotangents: Sequence[Tensor],
    of_slots: Sequence[Mapping[str, Tensor]],
) -> tuple[list[Tensor], list[Tensor], list[dict[str, Tensor]]]:
    """The transpose of :func:`step`: the cotangents of gradients, variables and slots before the step.

    Args:
        groups, numbers: as for :func:`step`.
        gradients: only which of them are None matters.
        slots: before the step; only which of them are None matters.
        cotangents, of_slots: the cotangents of the variables and of the slots after the step.
    """
    to_variables, to_slots = [*cotangents], [dict(given) for given in of_slots]
    to_gradients = [torch.zeros_like(c) if g is None else c for c, g in zip(cotangents, gradients, strict=True)]
    for number, began, indices in _together(numbers, gradients, slots, cotangents):
        group, own = groups[number], [cotangents[index] for index in indices]
        along: Tensors = torch._foreach_mul(own, -group["lr"])
        before: Tensors = ()
        momentum = group["momentum"]
        if momentum:
            given = [of_slots[index].get("momentum_buffer") for index in indices]
            buffers = _sum(torch._foreach_mul(along, momentum) if group["nesterov"] else along, given)
            taken = buffers
            if began:
                before = torch._foreach_mul(buffers, momentum)
                taken = torch._foreach_mul(buffers, 1 - group["dampening"]) if group["dampening"] else buffers
            along = torch._foreach_add(along, taken) if group["nesterov"] else taken
        decay = group["weight_decay"]
        rest = torch._foreach_add(own, along, alpha=decay) if decay else own
        along = torch._foreach_neg(along) if group["maximize"] else along
        for row, index in enumerate(indices):
            to_variables[index], to_gradients[index] = rest[row], along[row]
            to_slots[index] = {"momentum_buffer": before[row]} if before else {}
    return to_gradients, to_variables, to_slots


def _sum(tensors: Tensors, others: Sequence[Tensor | None]) -> Tensors:
    """The sums of tensors and others, where None is zero."""
    there = [other for other in others if other is not None]
    if len(there) == len(others):
        return torch._foreach_add(tensors, there)
    return [one if other is None else one + other for one, other in zip(tensors, others, strict=True)]
