"""Torch's Adam, AdamW, RMSprop and Adagrad as formulas over all tensors of a parameter group, and their transposes.

A step gives the same bits as torch's own, without running an optimizer on copies. Its transpose is the Jacobian of the
step in closed form: for p' = p - r m / d with a running mean m and a denominator d = sqrt(v) + eps, the cotangent c of
p' reaches m as -r c / d and v as r c m / (2 d^2 sqrt(v)), and both reach the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Adagrad, Adam, AdamW, Optimizer, RMSprop

from mlo.steps.own_step import has_torch_step

Tensors = list[Tensor] | tuple[Tensor, ...]
State = Mapping[str, Tensors]
Group = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """A step of the variables of one parameter group: those that have a gradient.

    Attributes:
        group: the hyperparameters.
        indices: the positions of the variables; the lists that follow are in this order.
        counts: the number of steps of each, this one included.
        state: the optimizer's tensors by their kind, before the step, or after it where it is only differentiated.
    """

    group: Group
    indices: list[int]
    counts: list[float]
    parameters: list[Tensor]
    gradients: list[Tensor]
    state: dict[str, list[Tensor]]


class Formula(Protocol):
    """One optimizer. ``along`` is the gradient with its sign and with weight decay, unless that is decoupled."""

    def begin(self, group: Group) -> tuple[str, ...]:
        """The kinds of tensors in the state, which are zero before the first step."""

    def reached(self, part: Part, along: Tensors) -> State:
        """The state after the step."""

    def step(self, part: Part, parameters: Tensors, along: Tensors) -> tuple[Tensors, State]:
        """The parameters and the state after the step."""

    def transpose(
        self, part: Part, along: Tensors, reached: State, cotangents: Tensors, after: State | None
    ) -> tuple[Tensors, State]:
        """Cotangents of ``along`` and of the state before the step; see :func:`transpose`."""


def formula_of(optimizer: Optimizer, groups: Sequence[Group]) -> Formula | None:
    """The formula of an optimizer's step; None where its class, or an option of a group, has none here."""
    formula = _FORMULAS.get(type(optimizer))
    if formula is None or not has_torch_step(optimizer):
        return None
    return formula if all(map(_has_formula, groups)) else None


def _has_formula(group: Group) -> bool:
    numbers = [group["lr"], group["weight_decay"], group["eps"], *group.get("betas", ())]
    plain = not any(isinstance(number, Tensor) for number in numbers)
    return plain and not any(group.get(flag) for flag in ("fused", "capturable", "differentiable"))


def step(formula: Formula, part: Part) -> tuple[Tensors, State]:
    """Parameters and state after one step, weight decay and ``maximize`` included."""
    parameters: Tensors = part.parameters
    if decay := _decoupled_decay(part.group):
        parameters = torch._foreach_mul(parameters, 1 - part.group["lr"] * decay)
    return formula.step(part, parameters, _along(part))


def reached(formula: Formula, part: Part) -> State:
    """The state after one step."""
    return formula.reached(part, _along(part))


def transpose(
    formula: Formula, part: Part, reached: State, cotangents: Tensors, after: State | None
) -> tuple[Tensors, Tensors, State]:
    """Cotangents of gradients, parameters and state before a step, from those of parameters and state after it.

    Args:
        reached: the state after the step.
        cotangents, after: of the parameters, and of those tensors of the state that have one; None: of what was before
            the step, only the cotangents of the gradients are asked for.
    """
    group = part.group
    to_along, to_state = formula.transpose(part, _along(part), reached, cotangents, after)
    before = cotangents
    if after is None:
        before = ()
    elif decay := _decoupled_decay(group):
        before = torch._foreach_mul(cotangents, 1 - group["lr"] * decay)
    elif group["weight_decay"]:
        before = torch._foreach_add(cotangents, to_along, alpha=group["weight_decay"])
    return torch._foreach_neg(to_along) if group["maximize"] else to_along, before, to_state


def _decoupled_decay(group: Group) -> float:
    return float(group["weight_decay"]) if group.get("decoupled_weight_decay") else 0.0


def _along(part: Part) -> Tensors:
    group = part.group
    along: Tensors = part.gradients
    if group["maximize"]:
        along = torch._foreach_neg(along)
    decay = 0 if group.get("decoupled_weight_decay") else group["weight_decay"]
    return torch._foreach_add(along, part.parameters, alpha=decay) if decay else along


class _Adam:
    """Adam and AdamW (Kingma and Ba 2015; Loshchilov and Hutter 2019), with or without AMSGrad."""

    def begin(self, group: Group) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ())

    def reached(self, part: Part, along: Tensors) -> State:
        beta1, beta2 = part.group["betas"]
        after = {
            "exp_avg": torch._foreach_lerp(part.state["exp_avg"], along, 1 - beta1),
            "exp_avg_sq": _mean_square(part.state["exp_avg_sq"], along, beta2),
        }
        if part.group["amsgrad"]:
            after["max_exp_avg_sq"] = torch._foreach_maximum(part.state["max_exp_avg_sq"], after["exp_avg_sq"])
        return after

    def step(self, part: Part, parameters: Tensors, along: Tensors) -> tuple[Tensors, State]:
        after = self.reached(part, along)
        bottom = self._fraction(part, after).bottom
        return torch._foreach_addcdiv(parameters, after["exp_avg"], bottom, self._rates(part)), after

    def transpose(
        self, part: Part, along: Tensors, reached: State, cotangents: Tensors, after: State | None
    ) -> tuple[Tensors, State]:
        beta1, beta2 = part.group["betas"]
        given = torch._foreach_mul(cotangents, self._rates(part))
        to_mean, to_square = self._fraction(part, reached).transpose(given, reached["exp_avg"])
        to_mean = _sum(to_mean, after, "exp_avg")
        before: dict[str, Tensors] = {}
        if part.group["amsgrad"]:
            to_square = _sum(to_square, after, "max_exp_avg_sq")
            largest, square = reached["max_exp_avg_sq"], reached["exp_avg_sq"]
            is_new = [(new == most).to(new.dtype) for new, most in zip(square, largest, strict=True)]
            to_new = torch._foreach_mul(to_square, is_new)
            before["max_exp_avg_sq"] = torch._foreach_sub(to_square, to_new)
            to_square = to_new
        to_square = _sum(to_square, after, "exp_avg_sq")
        if after is not None:
            before["exp_avg"] = torch._foreach_mul(to_mean, beta1)
            before["exp_avg_sq"] = torch._foreach_mul(to_square, beta2)
        torch._foreach_mul_(to_mean, 1 - beta1)
        torch._foreach_addcmul_(to_mean, along, to_square, value=2 * (1 - beta2))
        return to_mean, before

    def _fraction(self, part: Part, after: State) -> _Fraction:
        square = after["max_exp_avg_sq" if part.group["amsgrad"] else "exp_avg_sq"]
        beta2 = part.group["betas"][1]
        return _Fraction.over(square, [(1 - beta2**count) ** 0.5 for count in part.counts], part.group["eps"])

    def _rates(self, part: Part) -> list[float]:
        return [-(part.group["lr"] / (1 - part.group["betas"][0] ** count)) for count in part.counts]


class _RMSprop:
    """RMSprop (Hinton 2012), centered or not, with or without momentum."""

    def begin(self, group: Group) -> tuple[str, ...]:
        names = {"square_avg": True, "grad_avg": group["centered"], "momentum_buffer": group["momentum"] > 0}
        return tuple(name for name, used in names.items() if used)

    def reached(self, part: Part, along: Tensors) -> State:
        after = {"square_avg": _mean_square(part.state["square_avg"], along, part.group["alpha"])}
        if part.group["centered"]:
            after["grad_avg"] = torch._foreach_lerp(part.state["grad_avg"], along, 1 - part.group["alpha"])
        if part.group["momentum"] > 0:
            kept = torch._foreach_mul(part.state["momentum_buffer"], part.group["momentum"])
            after["momentum_buffer"] = torch._foreach_addcdiv(kept, along, self._fraction(part, after).bottom)
        return after

    def step(self, part: Part, parameters: Tensors, along: Tensors) -> tuple[Tensors, State]:
        after = self.reached(part, along)
        if part.group["momentum"] > 0:
            return torch._foreach_add(parameters, after["momentum_buffer"], alpha=-part.group["lr"]), after
        bottom = self._fraction(part, after).bottom
        return torch._foreach_addcdiv(parameters, along, bottom, value=-part.group["lr"]), after

    def transpose(
        self, part: Part, along: Tensors, reached: State, cotangents: Tensors, after: State | None
    ) -> tuple[Tensors, State]:
        alpha = part.group["alpha"]
        given: Tensors = torch._foreach_mul(cotangents, -part.group["lr"])
        before: dict[str, Tensors] = {}
        if part.group["momentum"] > 0:
            given = _sum(given, after, "momentum_buffer")
            before["momentum_buffer"] = torch._foreach_mul(given, part.group["momentum"])
        to_gradients, to_variance = self._fraction(part, reached).transpose(given, along)
        if part.group["centered"]:
            twice = torch._foreach_mul(torch._foreach_mul(reached["grad_avg"], to_variance), -2.0)
            to_mean = _sum(twice, after, "grad_avg")
            before["grad_avg"] = torch._foreach_mul(to_mean, alpha)
            to_gradients = torch._foreach_add(to_gradients, to_mean, alpha=1 - alpha)
        to_square = _sum(to_variance, after, "square_avg")
        before["square_avg"] = torch._foreach_mul(to_square, alpha)
        return torch._foreach_addcmul(to_gradients, along, to_square, value=2 * (1 - alpha)), before

    def _fraction(self, part: Part, after: State) -> _Fraction:
        variance = after["square_avg"]
        if part.group["centered"]:
            variance = torch._foreach_addcmul(variance, after["grad_avg"], after["grad_avg"], value=-1)
        return _Fraction.over(variance, None, part.group["eps"])


class _Adagrad:
    """Adagrad (Duchi et al. 2011)."""

    def begin(self, group: Group) -> tuple[str, ...]:
        return ("sum",)

    def reached(self, part: Part, along: Tensors) -> State:
        return {"sum": torch._foreach_addcmul(part.state["sum"], along, along)}

    def step(self, part: Part, parameters: Tensors, along: Tensors) -> tuple[Tensors, State]:
        after = self.reached(part, along)
        bottom = _Fraction.over(after["sum"], None, part.group["eps"]).bottom
        return torch._foreach_addcdiv(parameters, along, bottom, self._rates(part)), after

    def transpose(
        self, part: Part, along: Tensors, reached: State, cotangents: Tensors, after: State | None
    ) -> tuple[Tensors, State]:
        given = torch._foreach_mul(cotangents, self._rates(part))
        to_gradients, to_square = _Fraction.over(reached["sum"], None, part.group["eps"]).transpose(given, along)
        to_square = _sum(to_square, after, "sum")
        return torch._foreach_addcmul(to_gradients, along, to_square, value=2.0), {"sum": to_square}

    def _rates(self, part: Part) -> list[float]:
        return [-part.group["lr"] / (1 + (count - 1) * part.group["lr_decay"]) for count in part.counts]


@dataclass(frozen=True)
class _Fraction:
    """The denominator sqrt(square) / correction + eps, and what its derivative takes."""

    root: Tensors
    corrections: list[float]
    bottom: Tensors

    @classmethod
    def over(cls, square: Tensors, corrections: list[float] | None, eps: float) -> _Fraction:
        root = torch._foreach_sqrt(square)
        if corrections is None:
            return cls(root, [1.0] * len(root), torch._foreach_add(root, eps))
        bottom = torch._foreach_div(root, corrections)
        return cls(root, corrections, torch._foreach_add(bottom, eps))

    def transpose(self, cotangents: Tensors, top: Tensors) -> tuple[Tensors, Tensors]:
        """Cotangents of the numerator ``top`` and of ``square``, from those of top / bottom.

        To save memory, the given cotangents and the root are overwritten.

        Where the root is zero, or so small that it is rounded to zero, nothing is passed on to ``square``.
        """
        to_top = cotangents
        torch._foreach_div_(to_top, self.bottom)
        to_square = torch._foreach_mul(to_top, top)
        torch._foreach_div_(to_square, self.bottom)
        torch._foreach_mul_(to_square, torch._foreach_sign(self.root))
        smallest = [torch.finfo(root.dtype).tiny for root in self.root]
        torch._foreach_clamp_min_(self.root, smallest)
        torch._foreach_div_(to_square, self.root)
        torch._foreach_mul_(to_square, [-0.5 / correction for correction in self.corrections])
        return to_top, to_square


def _mean_square(square: Tensors, gradients: Tensors, decay: float) -> Tensors:
    return torch._foreach_addcmul(torch._foreach_mul(square, decay), gradients, gradients, value=1 - decay)


def _sum(one: Tensors, state: State | None, key: str) -> Tensors:
    """``one``, with the state's tensors of this name added where there are any."""
    return torch._foreach_add(one, state[key]) if state and key in state else one


_FORMULAS: dict[type[Optimizer], Formula] = {Adam: _Adam(), AdamW: _Adam(), RMSprop: _RMSprop(), Adagrad: _Adagrad()}
