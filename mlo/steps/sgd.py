"""The formulas of torch's SGD (momentum, dampening, Nesterov, weight decay) and their transpose.

Most lower levels use SGD. The general way (:mod:`mlo.steps.torch_step`) runs the user's optimizer on copies, which
takes several passes over the weights. These formulas give the same bits for the cost of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from mlo.levels.problem import Problem

Groups = tuple[Mapping[str, Any], ...]
Slots = Mapping[str, Mapping[str, Any]]


def applies(problem: Problem, groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the optimizer is torch's own SGD, unfused, with numbers (not tensors) as learning rates."""
    plain = type(problem.optimizer) is SGD
    return plain and not any(group["fused"] or isinstance(group["lr"], Tensor) for group in groups)


def step(
    of: Mapping[str, Mapping[str, Any]],
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor | None],
    slots: Slots,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The variables and slots after one step, as in :class:`torch.optim.SGD`; differentiable in all tensors.

    With gradient g, variable w and momentum buffer b: g <- g + weight_decay * w, b <- momentum * b +
    (1 - dampening) * g (at the first step b <- g), then w <- w - lr * b, or w <- w - lr * (g + momentum * b) with
    Nesterov, or w <- w - lr * g without momentum. With maximize, g is the negative gradient.

    Args:
        of: {variable: the hyperparameters of its group}; the learning rate may be a tensor.
        parameters: {name: tensor} before the step.
        gradients: {variable: its gradient, or None}; a variable without a gradient does not change.
        slots: the momentum buffers before the step.
    """
    moved, after = {}, {name: dict(slot) for name, slot in slots.items()}
    for name, group in of.items():
        parameter, gradient = parameters[name], gradients[name]
        if gradient is None:
            moved[name] = parameter.clone()
            continue
        along = -gradient if group["maximize"] else gradient
        if group["weight_decay"]:
            along = torch.add(along, parameter, alpha=group["weight_decay"])
        if momentum := group["momentum"]:
            last = after.get(name, {}).get("momentum_buffer")
            buffer = along.clone() if last is None else (last * momentum).add(along, alpha=1 - group["dampening"])
            after[name] = {"momentum_buffer": buffer}
            along = torch.add(along, buffer, alpha=momentum) if group["nesterov"] else buffer
        rate = group["lr"]
        by_tensor = isinstance(rate, Tensor)
        moved[name] = parameter - rate.to(along.dtype) * along if by_tensor else parameter.add(along, alpha=-rate)
    return moved, after


def scales(problem: Problem, groups: Groups, unreached: Collection[str], begun: Slots) -> list[float]:
    """For each variable, the derivative of its new value with respect to its gradient, which is a single number.

    Args:
        groups: the hyperparameters at the step.
        unreached: variables that had no gradient.
        begun: the slots before the step.
    """
    found = []
    for name, group in hyperparameters(problem, groups).items():
        scale = group["lr"] if group["maximize"] else -group["lr"]
        if momentum := group["momentum"]:
            first = begun.get(name, {}).get("momentum_buffer") is None
            share = 1.0 if first else 1.0 - group["dampening"]
            scale *= 1.0 + momentum * share if group["nesterov"] else share
        found.append(0.0 if name in unreached else scale)
    return found


def transpose(
    problem: Problem,
    groups: Groups,
    gradients: Mapping[str, Tensor | None],
    begun: Slots,
    cotangents: Mapping[str, Tensor],
    slots: Slots,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The transpose of :func:`step`: the cotangents of gradients, variables and slots before the step.

    Args:
        groups: the hyperparameters at the step.
        gradients: only which of them are None matters.
        begun: the slots before the step.
        cotangents, slots: the cotangents of the variables and of the slots after the step.
    """
    to_gradients, to_parameters, to_slots = {}, {}, {}
    for name, group in hyperparameters(problem, groups).items():
        cotangent, of_buffer = cotangents[name], slots.get(name, {}).get("momentum_buffer")
        if gradients[name] is None:
            to_gradients[name], to_parameters[name] = torch.zeros_like(cotangent), cotangent
            if of_buffer is not None:
                to_slots[name] = {"momentum_buffer": of_buffer}
            continue
        along = cotangent * -group["lr"]
        if momentum := group["momentum"]:
            buffer = along * momentum if group["nesterov"] else along
            buffer = buffer if of_buffer is None else buffer + of_buffer
            taken = buffer
            if begun.get(name, {}).get("momentum_buffer") is not None:
                to_slots[name] = {"momentum_buffer": buffer * momentum}
                taken = buffer * (1 - group["dampening"]) if group["dampening"] else buffer
            along = along + taken if group["nesterov"] else taken
        decay = group["weight_decay"]
        to_parameters[name] = torch.add(cotangent, along, alpha=decay) if decay else cotangent
        to_gradients[name] = -along if group["maximize"] else along
    return to_gradients, to_parameters, to_slots


def hyperparameters(problem: Problem, groups: Groups) -> dict[str, Mapping[str, Any]]:
    """{variable: the hyperparameters of its group}, from ``groups``."""
    return {name: groups[group] for name, group in group_numbers(problem).items()}


def group_numbers(problem: Problem) -> dict[str, int]:
    """{variable: the index of its parameter group}."""
    of = {id(p): number for number, group in enumerate(problem.optimizer.param_groups) for p in group["params"]}
    return {name: of[id(parameter)] for name, parameter in problem.variables.items()}
