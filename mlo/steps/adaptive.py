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

Tensors = list[Tensor] | tuple[Tensor, ...]
State = Mapping[str, Tensors]
Group = Mapping[str, Any]


class Formula(Protocol):
    """One optimizer, on the tensors of one parameter group; ``counts`` are their steps so far, this one included."""

    def begin(self, group: Group) -> tuple[str, ...]:
        """The names of the state's tensors, which are zero before the first step."""

    def step(
        self, group: Group, counts: Sequence[float], parameters: Tensors, gradients: Tensors, state: State
    ) -> tuple[Tensors, State]:
        """The parameters and the state after a step along ``gradients``."""

    def transpose(
        self, group: Group, counts: Sequence[float], gradients: Tensors, state: State, cotangents: Tensors, after: State
    ) -> tuple[Tensors, State]:
        """From cotangents of parameters and state after the step, those of the gradients and of the state before it."""


def formula_of(optimizer: Optimizer, groups: Sequence[Group]) -> Formula | None:
    """The formula of an optimizer's step; None where its class, or an option of a group, has none here."""
    formula = _FORMULAS.get(type(optimizer))
    return formula if formula and all(map(_has_formula, groups)) else None


def _has_formula(group: Group) -> bool:
    numbers = [group["lr"], group["weight_decay"], group["eps"], *group.get("betas", ())]
    plain = not any(isinstance(number, Tensor) for number in numbers)
    return plain and not any(group.get(flag) for flag in ("fused", "capturable", "differentiable"))


def step(
    formula: Formula, group: Group, counts: Sequence[float], parameters: Tensors, gradients: Tensors, state: State
) -> tuple[Tensors, State]:
    """Parameters and state after one step, weight decay and ``maximize`` included."""
    decay = group["weight_decay"]
    along = torch._foreach_neg(gradients) if group["maximize"] else gradients
    if decay and group.get("decoupled_weight_decay"):
        parameters = torch._foreach_mul(parameters, 1 - group["lr"] * decay)
    elif decay:
        along = torch._foreach_add(along, parameters, alpha=decay)
    return formula.step(group, counts, parameters, along, state)


def transpose(
    formula: Formula,
    group: Group,
    counts: Sequence[float],
    parameters: Tensors,
    gradients: Tensors,
    state: State,
    cotangents: Tensors,
    after: State,
) -> tuple[Tensors, Tensors, State]:
    """Cotangents of gradients, parameters and state before a step, from those of parameters and state after it."""
    decay, decoupled = group["weight_decay"], group.get("decoupled_weight_decay")
    along = torch._foreach_neg(gradients) if group["maximize"] else gradients
    if decay and not decoupled:
        along = torch._foreach_add(along, parameters, alpha=decay)
    to_along, to_state = formula.transpose(group, counts, along, state, cotangents, after)
    before = cotangents
    if decay and decoupled:
        before = torch._foreach_mul(cotangents, 1 - group["lr"] * decay)
    elif decay:
        before = torch._foreach_add(cotangents, to_along, alpha=decay)
    return torch._foreach_neg(to_along) if group["maximize"] else to_along, before, to_state


class _Adam:
    """Adam and AdamW (Kingma and Ba 2015; Loshchilov and Hutter 2019), with or without AMSGrad."""

    def begin(self, group: Group) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ())

    def step(
        self, group: Group, counts: Sequence[float], parameters: Tensors, gradients: Tensors, state: State
    ) -> tuple[Tensors, State]:
        after, fraction = self._update(group, counts, gradients, state)
        rates = [-rate for rate in self._rates(group, counts)]
        return torch._foreach_addcdiv(parameters, after["exp_avg"], fraction.bottom, rates), after

    def transpose(
        self, group: Group, counts: Sequence[float], gradients: Tensors, state: State, cotangents: Tensors, after: State
    ) -> tuple[Tensors, State]:
        beta1, beta2 = group["betas"]
        reached, fraction = self._update(group, counts, gradients, state)
        given = torch._foreach_mul(cotangents, [-rate for rate in self._rates(group, counts)])
        to_mean, to_square = fraction.transpose(given, reached["exp_avg"])
        to_mean = _sum(to_mean, after.get("exp_avg"))
        before: dict[str, Tensors] = {}
        if group["amsgrad"]:
            to_square = _sum(to_square, after.get("max_exp_avg_sq"))
            shares = [_share(old, new) for old, new in zip(state["max_exp_avg_sq"], reached["exp_avg_sq"], strict=True)]
            to_new = torch._foreach_mul(to_square, shares)
            before["max_exp_avg_sq"] = torch._foreach_sub(to_square, to_new)
            to_square = to_new
        to_square = _sum(to_square, after.get("exp_avg_sq"))
        before |= {"exp_avg": torch._foreach_mul(to_mean, beta1), "exp_avg_sq": torch._foreach_mul(to_square, beta2)}
        to_gradients = torch._foreach_mul(to_mean, 1 - beta1)
        return torch._foreach_addcmul(to_gradients, gradients, to_square, value=2 * (1 - beta2)), before

    def _update(
        self, group: Group, counts: Sequence[float], gradients: Tensors, state: State
    ) -> tuple[dict[str, Tensors], _Fraction]:
        beta1, beta2 = group["betas"]
        after: dict[str, Tensors] = {
            "exp_avg": torch._foreach_lerp(state["exp_avg"], gradients, 1 - beta1),
            "exp_avg_sq": _mean_square(state["exp_avg_sq"], gradients, beta2),
        }
        square = after["exp_avg_sq"]
        if group["amsgrad"]:
            after["max_exp_avg_sq"] = square = torch._foreach_maximum(state["max_exp_avg_sq"], square)
        return after, _Fraction.over(square, [(1 - beta2**count) ** 0.5 for count in counts], group["eps"])

    def _rates(self, group: Group, counts: Sequence[float]) -> list[float]:
        return [group["lr"] / (1 - group["betas"][0] ** count) for count in counts]


class _RMSprop:
    """RMSprop (Hinton 2012), centered or not, with or without momentum."""

    def begin(self, group: Group) -> tuple[str, ...]:
        names = {"square_avg": True, "grad_avg": group["centered"], "momentum_buffer": group["momentum"] > 0}
        return tuple(name for name, used in names.items() if used)

    def step(
        self, group: Group, counts: Sequence[float], parameters: Tensors, gradients: Tensors, state: State
    ) -> tuple[Tensors, State]:
        after, fraction = self._update(group, gradients, state)
        if group["momentum"] > 0:
            kept = torch._foreach_mul(state["momentum_buffer"], group["momentum"])
            after["momentum_buffer"] = torch._foreach_addcdiv(kept, gradients, fraction.bottom)
            return torch._foreach_add(parameters, after["momentum_buffer"], alpha=-group["lr"]), after
        return torch._foreach_addcdiv(parameters, gradients, fraction.bottom, value=-group["lr"]), after

    def transpose(
        self, group: Group, counts: Sequence[float], gradients: Tensors, state: State, cotangents: Tensors, after: State
    ) -> tuple[Tensors, State]:
        alpha = group["alpha"]
        reached, fraction = self._update(group, gradients, state)
        given: Tensors = torch._foreach_mul(cotangents, -group["lr"])
        before: dict[str, Tensors] = {}
        if group["momentum"] > 0:
            given = _sum(given, after.get("momentum_buffer"))
            before["momentum_buffer"] = torch._foreach_mul(given, group["momentum"])
        to_gradients, to_variance = fraction.transpose(given, gradients)
        if group["centered"]:
            to_mean = _sum(
                torch._foreach_mul(torch._foreach_mul(reached["grad_avg"], to_variance), -2.0), after.get("grad_avg")
            )
            before["grad_avg"] = torch._foreach_mul(to_mean, alpha)
            to_gradients = torch._foreach_add(to_gradients, to_mean, alpha=1 - alpha)
        to_square = _sum(to_variance, after.get("square_avg"))
        before["square_avg"] = torch._foreach_mul(to_square, alpha)
        return torch._foreach_addcmul(to_gradients, gradients, to_square, value=2 * (1 - alpha)), before

    def _update(self, group: Group, gradients: Tensors, state: State) -> tuple[dict[str, Tensors], _Fraction]:
        after: dict[str, Tensors] = {"square_avg": _mean_square(state["square_avg"], gradients, group["alpha"])}
        variance: Tensors = after["square_avg"]
        if group["centered"]:
            after["grad_avg"] = mean = torch._foreach_lerp(state["grad_avg"], gradients, 1 - group["alpha"])
            variance = torch._foreach_addcmul(variance, mean, mean, value=-1)
        return after, _Fraction.over(variance, None, group["eps"])


class _Adagrad:
    """Adagrad (Duchi et al. 2011)."""

    def begin(self, group: Group) -> tuple[str, ...]:
        return ("sum",)

    def step(
        self, group: Group, counts: Sequence[float], parameters: Tensors, gradients: Tensors, state: State
    ) -> tuple[Tensors, State]:
        square = torch._foreach_addcmul(state["sum"], gradients, gradients)
        bottom = _Fraction.over(square, None, group["eps"]).bottom
        return torch._foreach_addcdiv(parameters, gradients, bottom, self._rates(group, counts)), {"sum": square}

    def transpose(
        self, group: Group, counts: Sequence[float], gradients: Tensors, state: State, cotangents: Tensors, after: State
    ) -> tuple[Tensors, State]:
        square = torch._foreach_addcmul(state["sum"], gradients, gradients)
        given = torch._foreach_mul(cotangents, self._rates(group, counts))
        to_gradients, to_square = _Fraction.over(square, None, group["eps"]).transpose(given, gradients)
        to_square = _sum(to_square, after.get("sum"))
        return torch._foreach_addcmul(to_gradients, gradients, to_square, value=2.0), {"sum": to_square}

    def _rates(self, group: Group, counts: Sequence[float]) -> list[float]:
        return [-group["lr"] / (1 + (count - 1) * group["lr_decay"]) for count in counts]


@dataclass(frozen=True)
class _Fraction:
    """The denominator sqrt(square) / correction + eps, and what its derivative takes."""

    root: Tensors
    corrections: list[float]
    bottom: Tensors

    @classmethod
    def over(cls, square: Tensors, corrections: list[float] | None, eps: float) -> _Fraction:
        root = torch._foreach_sqrt(square)
        scaled = root if corrections is None else torch._foreach_div(root, corrections)
        return cls(root, corrections or [1.0] * len(root), torch._foreach_add(scaled, eps))

    def transpose(self, cotangents: Tensors, top: Tensors) -> tuple[Tensors, Tensors]:
        """Cotangents of the numerator ``top`` and of ``square``, from those of top / bottom.

        Where the root is zero, so is the numerator and all that it could pass on to ``square``.
        """
        to_top = torch._foreach_div(cotangents, self.bottom)
        to_bottom = torch._foreach_div(torch._foreach_mul(to_top, top), self.bottom)
        smallest = [torch.finfo(root.dtype).tiny for root in self.root]
        inverse = torch._foreach_div(torch._foreach_sign(self.root), torch._foreach_clamp_min(self.root, smallest))
        to_square = torch._foreach_mul(torch._foreach_mul(to_bottom, inverse), [-0.5 / c for c in self.corrections])
        return to_top, to_square


def _mean_square(square: Tensors, gradients: Tensors, decay: float) -> Tensors:
    return torch._foreach_addcmul(torch._foreach_mul(square, decay), gradients, gradients, value=1 - decay)


def _share(old: Tensor, new: Tensor) -> Tensor:
    """The derivative of max(old, new) in ``new``: one half where they are equal, as torch has it."""
    return torch.heaviside(new - old, new.new_tensor(0.5))


def _sum(one: Tensors, other: Tensors | None) -> Tensors:
    return one if other is None else torch._foreach_add(one, other)


_FORMULAS: dict[type[Optimizer], Formula] = {Adam: _Adam(), AdamW: _Adam(), RMSprop: _RMSprop(), Adagrad: _Adagrad()}
