"""One optimizer step as a function of variables, gradients and slots, hooks and clipping included; its transpose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlo.errors import ConfigError
from mlo.levels.problem import Problem, has_hooks
from mlo.levels.state import State, leaves
from mlo.ops.rng import replay
from mlo.ops.vectors import Vector
from mlo.steps import formulas, sgd, torch_step
from mlo.steps.adaptive import formula_of
from mlo.steps.clipping import clip, transpose_clip
from mlo.steps.formulas import Gradients, Group
from mlo.steps.hooks import hooked, transpose_hooks
from mlo.steps.own_step import Held, has_torch_step, is_replaced

_PLAIN = frozenset((int, float, bool, type(None), str))
#: the hyperparameters of each parameter group of an optimizer
Groups = tuple[Group, ...]


def hyperparameters(problem: Problem) -> Groups:
    """The present hyperparameters of the problem's optimizer, with the learning rates that schedulers have set.

    Raises:
        ConfigError: if one of them requires gradients.
    """
    found = []
    for group in problem.optimizer.param_groups:
        of = {**group}
        del of["params"]
        for key, value in of.items():
            if isinstance(value, Tensor):
                if value.requires_grad:
                    refuse_learned(problem)
                of[key] = value.clone()
        found.append(of)
    return tuple(found)


def refuse_learned(problem: Problem) -> None:
    """Raise a ConfigError if a hyperparameter requires gradients: nothing is differentiated for it."""
    for group in problem.optimizer.param_groups:
        for key, value in group.items():
            if type(value) in _PLAIN or key == "params":
                continue
            values = value if isinstance(value, tuple | list) else (value,)
            if any([isinstance(each, Tensor) and each.requires_grad for each in values]):
                raise ConfigError(
                    f"problem {problem.name!r}: the option {key!r} of its {type(problem.optimizer).__name__} is a "
                    "tensor that requires gradients, but no gradient flows through options of an optimizer; pass a "
                    "number (.item()) or .detach(). Instead, write the step as part of the upper loss; or learn a "
                    "factor of the loss, which acts like a learning rate with SGD, but hardly with Adam and others "
                    "that divide by the size of gradients"
                )


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
    plain_sgd = sgd.applies(problem.optimizer, groups)
    if slots is None and is_linear(problem, groups) and sgd.by_numbers(groups):
        unreached = [index for index, gradient in enumerate(gradients) if gradient is None]
        scales: Any = sgd.scales([groups[number] for number in numbers], unreached, state.slots)
        return StepCotangents(tuple(torch._foreach_mul(cotangent, scales)), (), ())
    before_clip = hooked(problem, gradients)
    clipped = clip(before_clip, largest)
    if plain_sgd:
        found: Any = sgd.transpose(groups, numbers, clipped, state.slots, cotangent, slots or ({},) * len(numbers))
    elif formula := formula_of(problem.optimizer, groups):
        found = formulas.transpose(formula, groups, numbers, state, clipped, stepped, cotangent, slots)
    else:
        found = torch_step.transpose(problem, groups, state.variables, clipped, state.slots, cotangent, slots)
    onto = tuple(transpose_hooks(problem, gradients, transpose_clip(before_clip, largest, found[0])))
    return StepCotangents(onto, (), ()) if slots is None else StepCotangents(onto, tuple(found[1]), tuple(found[2]))


def check_differentiable(problem: Problem) -> None:
    """Raise a ConfigError if a step of the problem's optimizer, or a hook before it, cannot be differentiated."""
    if "differentiable" not in problem.optimizer.defaults:
        raise ConfigError(
            f"problem {problem.name!r}: a step of {type(problem.optimizer).__name__} cannot be differentiated (it has "
            "no option differentiable=True); use another optimizer, or pass hypergradient='cg', 'neumann' or "
            "'first_order', which do not differentiate optimizer steps"
        )
    with replay(None, problem.live_state().device, outside=True):
        gradients = _any_gradients(problem)
        transpose_hooks(problem, gradients, gradients)
        if not has_torch_step(problem.optimizer):
            _twice(problem, differentiable_step)


def check_own_step(problem: Problem) -> None:
    """Raise a ConfigError if a user's own optimizer would, in a step on copies, change more than these."""
    optimizer, kind = problem.optimizer, type(problem.optimizer).__name__
    if is_replaced(optimizer):
        raise ConfigError(
            f"problem {problem.name!r}: the method step of its {kind} was replaced by another function, which virtual "
            "steps cannot run on copies; override step in a subclass, with super().step() in it"
        )
    if has_torch_step(optimizer):
        return
    held = Held(optimizer)
    with replay(None, problem.live_state().device, outside=True):
        _twice(problem, virtual_step)
    if (changed := held.restored()) is not None:
        raise ConfigError(
            f"problem {problem.name!r}: a step of {kind} on copies changes {changed} of the optimizer itself; reach "
            "parameters through self.param_groups, and keep what a step needs of earlier ones in self.state[parameter]"
        )


def _twice(problem: Problem, take: Callable[[Problem, State, Gradients, Groups], State]) -> None:
    """Two steps on copies, from which nothing is kept, of the problem's own optimizer and of no hooks."""
    live, groups = problem.live_state(), hyperparameters(problem)
    state = live._replace(variables=leaves(live.variables), slots=problem.optimizer_slots(), live=False)
    for _ in range(2):
        state = take(problem, state, _any_gradients(problem), groups)


def _any_gradients(problem: Problem) -> Vector:
    return tuple([torch.randn_like(variable, requires_grad=True) for variable in problem.variables.values()])
