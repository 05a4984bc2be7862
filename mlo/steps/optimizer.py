"""One optimizer step as a function of parameters, gradients and state, clipping included, and its transpose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mlo.errors import ConfigError
from mlo.levels.problem import Problem
from mlo.ops.vectors import Vector
from mlo.steps import parameter_groups, sgd, torch_step
from mlo.steps.adaptive import formula_of
from mlo.steps.clipping import clip, transpose_clip
from mlo.steps.optimizer_state import OptimizerState
from mlo.steps.parameter_groups import Gradients, Tensors


def virtual_step(
    problem: Problem, parameters: Tensors, gradients: Gradients, optimizer_state: OptimizerState
) -> tuple[dict[str, Tensor], OptimizerState]:
    """One optimizer step, without changing anything: the new variables, which require gradients, and the new state."""
    with torch.no_grad():
        moved, after = _step(
            problem, parameters, clip(gradients, problem.clip_norm_now), optimizer_state, differentiable=False
        )
    return {n: p.detach().requires_grad_() for n, p in moved.items()}, after


def differentiable_step(
    problem: Problem, parameters: Tensors, gradients: Gradients, optimizer_state: OptimizerState
) -> tuple[dict[str, Tensor], OptimizerState]:
    """Like :func:`virtual_step`, but differentiable in parameters, gradients and optimizer state."""
    with torch.enable_grad():
        return _step(problem, parameters, clip(gradients, problem.clip_norm_now), optimizer_state, differentiable=True)


def _step(
    problem: Problem,
    parameters: Tensors,
    gradients: Gradients,
    optimizer_state: OptimizerState,
    *,
    differentiable: bool,
) -> tuple[dict[str, Tensor], OptimizerState]:
    groups = optimizer_state.groups
    if sgd.applies(problem, groups):
        of = sgd.hyperparameters(problem, groups)
        moved, slots = sgd.step(of, parameters, gradients, optimizer_state.slots)
        return moved, OptimizerState(groups, slots)
    # torch cannot differentiate its operators on lists of tensors, nor step all optimizers with sparse gradients
    dense = not any(g is not None and g.is_sparse for g in gradients.values())
    if dense and not differentiable and (formula := formula_of(problem.optimizer, groups)):
        return parameter_groups.step(problem, formula, parameters, gradients, optimizer_state)
    return torch_step.step(problem, parameters, gradients, optimizer_state, differentiable=differentiable)


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


def needs_only_state_after(problem: Problem) -> bool:
    """Whether the state after a step is enough to differentiate it: then no copy of the one before is needed."""
    return formula_of(problem.optimizer, problem.optimizer.param_groups) is not None


@torch.no_grad()
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
    names, groups, begun = list(problem.variables), optimizer_state.groups, optimizer_state.slots
    plain_sgd = sgd.applies(problem, groups)
    if plain_sgd and slots is None and problem.clip_norm_now is None:
        scales = sgd.scales(problem, groups, [n for n, g in gradients.items() if g is None], begun)
        return StepCotangents(tuple(c * scale for c, scale in zip(cotangent, scales, strict=True)), (), {})
    clipped, named = clip(gradients, problem.clip_norm_now), dict(zip(names, cotangent, strict=True))
    if plain_sgd:
        found = sgd.transpose(problem, groups, clipped, begun, named, slots or {})
    elif formula := formula_of(problem.optimizer, groups):
        found = parameter_groups.transpose(problem, formula, parameters, clipped, optimizer_state, named, slots)
    else:
        found = torch_step.transpose(problem, parameters, clipped, optimizer_state, named, slots)
    to_gradients = transpose_clip(gradients, problem.clip_norm_now, found[0])
    onto = tuple(to_gradients[name] for name in names)
    return StepCotangents(onto, () if slots is None else tuple(found[1][name] for name in names), found[2])


def check_differentiable(problem: Problem) -> None:
    """Raise a ConfigError if torch cannot differentiate a step of the problem's optimizer."""
    if "differentiable" not in problem.optimizer.defaults:
        raise ConfigError(
            f"problem {problem.name!r}: a step of {type(problem.optimizer).__name__} cannot be differentiated (it has "
            "no option differentiable=True); use another optimizer, or pass hypergradient='cg', 'neumann' or "
            "'first_order', which do not differentiate optimizer steps"
        )
