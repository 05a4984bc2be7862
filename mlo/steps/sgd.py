"""The formulas of torch's SGD (momentum, dampening, Nesterov, weight decay) and their transpose.

Most lower levels use SGD. The general way (:mod:`mlo.steps.torch_step`) runs the user's optimizer on copies, which
takes several passes over the weights. These formulas give the same bits for the cost of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

Group = Mapping[str, Any]
Slots = Sequence[Mapping[str, Any]]
Gradients = Sequence[Tensor | None]


def applies(optimizer: Optimizer, groups: Sequence[Group]) -> bool:
    """Whether the optimizer is torch's own SGD, unfused, with numbers (not tensors) as learning rates."""
    if type(optimizer) is not SGD:
        return False
    return not any([group["fused"] or isinstance(group["lr"], Tensor) for group in groups])


def step(
    of: Sequence[Group], variables: Sequence[Tensor], gradients: Gradients, slots: Slots
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """The variables and slots after one step, as in :class:`torch.optim.SGD`; differentiable in all tensors.

    With gradient g, variable w and momentum buffer b: g <- g + weight_decay * w, b <- momentum * b +
    (1 - dampening) * g (at the first step b <- g), then w <- w - lr * b, or w <- w - lr * (g + momentum * b) with
    Nesterov, or w <- w - lr * g without momentum. With maximize, g is the negative gradient.

    Args:
        of: the hyperparameters of each variable's group; the learning rate may be a tensor.
        variables: before the step.
        gradients: a variable whose gradient is None does not change.
        slots: of each variable, {"momentum_buffer": tensor or None} or {}.
    """
    moved, after = [], []
    for group, variable, gradient, slot in zip(of, variables, gradients, slots, strict=True):
        if gradient is None:
            moved.append(variable.clone())
            after.append(dict(slot))
            continue
        along = -gradient if group["maximize"] else gradient
        if group["weight_decay"]:
            along = torch.add(along, variable, alpha=group["weight_decay"])
        kept = {}
        if momentum := group["momentum"]:
            last = slot.get("momentum_buffer")
            buffer = along.clone() if last is None else (last * momentum).add(along, alpha=1 - group["dampening"])
            kept = {"momentum_buffer": buffer}
            along = torch.add(along, buffer, alpha=momentum) if group["nesterov"] else buffer
        rate = group["lr"]
        by_tensor = isinstance(rate, Tensor)
        moved.append(variable - rate.to(along.dtype) * along if by_tensor else variable.add(along, alpha=-rate))
        after.append(kept)
    return moved, after


def scales(of: Iterable[Group], unreached: Collection[int], slots: Slots) -> list[float]:
    """For each variable, the derivative of its new value with respect to its gradient, which is a single number.

    Args:
        of: the hyperparameters of each variable's group.
        unreached: the positions of variables that had no gradient.
        slots: before the step.
    """
    found = []
    for index, group in enumerate(of):
        scale = group["lr"] if group["maximize"] else -group["lr"]
        if momentum := group["momentum"]:
            first = slots[index].get("momentum_buffer") is None
            share = 1.0 if first else 1.0 - group["dampening"]
            scale *= 1.0 + momentum * share if group["nesterov"] else share
        found.append(0.0 if index in unreached else scale)
    return found


def transpose(
    of: Sequence[Group],
    gradients: Gradients,
    slots: Slots,
    cotangents: Sequence[Tensor],
    of_slots: Sequence[Mapping[str, Tensor]],
) -> tuple[list[Tensor], list[Tensor], list[dict[str, Tensor]]]:
    """The transpose of :func:`step`: the cotangents of gradients, variables and slots before the step.

    Args:
        of: the hyperparameters of each variable's group.
        gradients: only which of them are None matters.
        slots: before the step.
        cotangents, of_slots: the cotangents of the variables and of the slots after the step.
    """
    to_gradients, to_variables, to_slots = [], [], []
    for group, gradient, slot, cotangent, given in zip(of, gradients, slots, cotangents, of_slots, strict=True):
        of_buffer = given.get("momentum_buffer")
        if gradient is None:
            to_gradients.append(torch.zeros_like(cotangent))
            to_variables.append(cotangent)
            to_slots.append(dict(given))
            continue
        along, before = cotangent * -group["lr"], {}
        if momentum := group["momentum"]:
            buffer = along * momentum if group["nesterov"] else along
            buffer = buffer if of_buffer is None else buffer + of_buffer
            taken = buffer
            if slot.get("momentum_buffer") is not None:
                before = {"momentum_buffer": buffer * momentum}
                taken = buffer * (1 - group["dampening"]) if group["dampening"] else buffer
            along = along + taken if group["nesterov"] else taken
        decay = group["weight_decay"]
        to_variables.append(torch.add(cotangent, along, alpha=decay) if decay else cotangent)
        to_gradients.append(-along if group["maximize"] else along)
        to_slots.append(before)
    return to_gradients, to_variables, to_slots
