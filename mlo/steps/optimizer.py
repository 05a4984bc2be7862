"""One optimizer step as a function of variables, gradients and slots, hooks and clipping included; its transpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlo.levels.problem import Problem, has_hooks
from mlo.levels.state import State
from mlo.ops.vectors import Vector
from mlo.steps import formulas, sgd, torch_step
from mlo.steps.adaptive import formula_of
from mlo.steps.clipping import clip, transpose_clip
from mlo.steps.formulas import Gradients, Group
from mlo.steps.hooks import hooked, transpose_hooks

#: the hyperparameters of each parameter group of an optimizer
Groups = tuple[Group, ...]


def hyperparameters(problem: Problem) -> Groups:
    """The present hyperparameters of the problem's optimizer, with the learning rates that schedulers have set."""
    found = []
    for group in problem.optimizer.param_groups:
        of = {**group}
        del of["params"]
        for key, value in of.items():
            if isinstance(value, Tensor):
                of[key] = value.clone()
        found.append(of)
    return tuple(found)


def virtual_step(problem: Problem, state: State, gradients: Gradients, groups: Groups) -> State:
    """The state after one optimizer step; nothing changes. The new variables require gradients."""
    with torch.no_grad():
        taken = clip(hooked(problem, gradients), problem.clip_norm_now)
        moved = _step(problem, state, taken, groups, differentiable=False)
    return moved._replace(variables=tuple([v.requires_grad_() for v in moved.variables]))


def differentiable_step(problem: Problem, state: State, gradients: Gradients, groups: Groups) -> State:
    """Like :func:`virtual_step`, but differentiable in variables, gradients and slots."""
    with torch.enable_grad():
        taken = clip(hooked(problem, gradients), problem.clip_norm_now)
        return _step(problem, state, taken, groups, differentiable=True)


def sgd_step(problem: Problem, state: State, gradients: Gradients, groups: Groups) -> State:
    """:func:`differentiable_step` of torch's SGD without hooks and clipping; learning rates may be tensors."""
    variables, slots = sgd.step(groups, problem.group_numbers, state.variables, gradients, state.slots)
    return State(tuple(variables), state.constants, state.buffers, tuple(slots))


def _step(problem: Problem, state: State, gradients: Gradients, groups: Groups, *, differentiable: bool) -> State:
    if sgd.applies(problem.optimizer, groups):
        return sgd_step(problem, state, gradients, groups)
    numbers = problem.group_numbers
    # torch cannot differentiate its operators on lists of tensors, nor step all optimizers with sparse gradients
    sparse = any([g is not None and g.is_sparse for g in gradients])
    if not sparse and not differentiable and (formula := formula_of(problem.optimizer, groups)):
        found: Any = formulas.step(formula, groups, numbers, state, gradients)
    else:
        found = torch_step.step(problem, groups, state.variables, gradients, state.slots, differentiable=differentiable)
    return State(tuple(found[0]), state.constants, state.buffers, tuple(found[1]))


class StepCotangents(NamedTuple):
    """The cotangents of a step's inputs.

    Attributes:
        gradient: of the gradient, one tensor per variable.
        variables: of the variables before the step; empty if they were not asked for.
        slots: of the optimizer's slots before the step, for each variable.
    """

    gradient: Vector
    variables: Vector
    slots: tuple[Mapping[str, Tensor], ...]


def is_linear(problem: Problem, groups: Sequence[Group]) -> bool:
    """Whether the step is linear: its Jacobian does not depend on the values of gradient and slots."""
    plain = problem.clip_norm_now is None and not has_hooks(problem.variables)
    return plain and sgd.applies(problem.optimizer, groups)


def needs_only_after(problem: Problem, groups: Sequence[Group]) -> bool:
    """Whether the slots after a step are enough to differentiate it: then no copy of those before is needed."""
    return formula_of(problem.optimizer, groups) is not None


@torch.no_grad()
def transpose_step(
    problem: Problem,
    state: State,
    gradients: Gradients,
    groups: Groups,
    cotangent: Vector,
    slots: Sequence[Mapping[str, Tensor]] | None = None,
    *,
    stepped: bool = False,
) -> StepCotangents:
    """The transposed Jacobian of one optimizer step: from the cotangents of its results to those of its inputs.

    It includes all that the user's optimizer does (learning rate, momentum, Adam's scaling), gradient clipping, and the
    hooks of parameters.

    Args:
        state, gradients, groups: the inputs of the step. If it :func:`is_linear`, only the presence of gradients and
            slots matters, not their values.
        cotangent: of the variables after the step.
        slots: cotangents of the optimizer's slots after the step. None: only the cotangent of the gradient is computed;
            variables and slots before the step are held fixed.
        stepped: whether the slots in ``state`` are those after the step.
    """
    numbers, largest = problem.group_numbers, problem.clip_norm_now
    if slots is None and is_linear(problem, groups) and sgd.by_numbers(groups):
        unreached = [index for index, gradient in enumerate(gradients) if gradient is None]
        scales: Any = sgd.scales([groups[number] for number in numbers], unreached, state.slots)
        return StepCotangents(tuple(torch._foreach_mul(cotangent, scales)), (), ())
    before_clip = hooked(problem, gradients)
    clipped = clip(before_clip, largest)
    if sgd.applies(problem.optimizer, groups):
        found: Any = sgd.transpose(groups, numbers, clipped, state.slots, cotangent, slots or ({},) * len(numbers))
    elif formula := formula_of(problem.optimizer, groups):
        found = formulas.transpose(formula, groups, numbers, state, clipped, stepped, cotangent, slots)
    else:
        found = torch_step.transpose(problem, groups, state.variables, clipped, state.slots, cotangent, slots)
    onto = tuple(transpose_hooks(problem, gradients, transpose_clip(before_clip, largest, found[0])))
    return StepCotangents(onto, (), ()) if slots is None else StepCotangents(onto, tuple(found[1]), tuple(found[2]))
