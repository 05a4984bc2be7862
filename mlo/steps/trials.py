"""Trial steps on copies, when an engine is made: whether a user's step, or a hook, is a function of what it gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mlo.errors import ConfigError
from mlo.levels.problem import Problem
from mlo.levels.state import State
from mlo.ops.lost_graphs import Touched
from mlo.ops.rng import Randomness, replay
from mlo.ops.vectors import Vector
from mlo.steps.autograd_graph import leaves_of
from mlo.steps.formulas import Gradients
from mlo.steps.hooks import run_hooks, transpose_hooks
from mlo.steps.optimizer import Groups, differentiable_step, hyperparameters, virtual_step
from mlo.steps.own_step import Held, has_torch_step, is_replaced

_FROM_STATE = "keep what a step needs of earlier ones in self.state[parameter], as numbers or tensors"
#: what a step without a closure, or on copies, may raise
_ERRORS = (RuntimeError, AssertionError, TypeError, ValueError, AttributeError, LookupError)


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
        _check_hooks(problem, gradients)
        transpose_hooks(problem, gradients, gradients)
        if not has_torch_step(problem.optimizer):
            _refuse(problem, _try(problem, differentiable_step))


def check_own_step(problem: Problem) -> None:
    """Raise a ConfigError if a user's own optimizer would, in a step on copies, change or read more than these."""
    optimizer, kind = problem.optimizer, type(problem.optimizer).__name__
    if is_replaced(optimizer):
        raise ConfigError(
            f"problem {problem.name!r}: the method step of its {kind} was replaced by another function, which virtual "
            "steps cannot run on copies; override step in a subclass, with super().step() in it"
        )
    if has_torch_step(optimizer):
        return
    _refuse_containers(problem, problem.optimizer_slots())
    held, changed = Held(optimizer), None
    try:
        with replay(None, problem.live_state().device, outside=True):
            tried = _try(problem, virtual_step)
    finally:
        changed = held.restored()
    if changed is not None:
        raise ConfigError(
            f"problem {problem.name!r}: a step of {kind} on copies changes {changed} of the optimizer itself; reach "
            f"parameters through self.param_groups, and {_FROM_STATE}"
        )
    _refuse(problem, tried)


class _Tried(NamedTuple):
    """What trial steps have shown.

    Attributes:
        repeats: whether a step from the same state, with the same gradient, gives the same result.
        read: which of the problem's own parameters a step on copies has read, and where.
        strays: whether its results have a graph to other tensors than it was given.
    """

    repeats: bool
    read: str | None
    strays: bool


def _try(problem: Problem, take: Callable[[Problem, State, Gradients, Groups], State]) -> _Tried:
    """Two steps on copies, from which nothing is kept, of the problem's own optimizer; the second one is repeated."""
    live, groups = problem.live_state(), hyperparameters(problem)
    variables = tuple([v.detach().clone().requires_grad_(v.requires_grad) for v in live.variables])
    state = live._replace(variables=variables, slots=problem.optimizer_slots(), live=False)
    first, second = _any_gradients(problem), _any_gradients(problem)
    again = tuple([gradient.detach().clone().requires_grad_() for gradient in second])  # a step may write into it
    taken = list[State]()
    try:
        with Touched(problem.variables) as touched:
            one = take(problem, state, first, groups)
            _refuse_containers(problem, one.slots)
            begun = Randomness.capture(live.device, outside=True)
            for gradients in (second, again):
                with replay(begun, live.device):
                    taken.append(take(problem, one, gradients, groups))
    except _ERRORS as error:
        raise ConfigError(
            f"problem {problem.name!r}: a step of {type(problem.optimizer).__name__} on copies raises "
            f"{type(error).__name__}: {error}. Its step is called without a closure, so it can neither evaluate the "
            "loss nor take its gradient again; it must reach parameters through self.param_groups"
        ) from error
    results = [[t for t in tree_leaves((s.variables, s.slots)) if isinstance(t, Tensor)] for s in taken]
    given = {*map(id, (*variables, *first, *second))}
    strays = any([bool(leaves_of(t) - given) for t in results[0]])
    return _Tried(_same(*results), touched.where, strays)


def _refuse(problem: Problem, tried: _Tried) -> None:
    """Raise a ConfigError for a step that is not a function of parameters, gradients and state."""
    what = f"problem {problem.name!r}: a step of {type(problem.optimizer).__name__}"
    if not tried.repeats:
        raise ConfigError(
            f"{what} from the same state, with the same gradient, has another result the second time, so it depends on "
            f"something that it changes itself; {_FROM_STATE}"
        )
    if tried.read is not None:
        raise ConfigError(f"{what} on copies reads {tried.read}, {_NOT_MOVED}; reach it through self.param_groups")
    if tried.strays:
        raise ConfigError(f"{what} depends on {_STRAY}")


def _check_hooks(problem: Problem, gradients: Sequence[Tensor]) -> None:
    """Raise a ConfigError for a hook of a parameter that is not a function of the gradient."""
    for (name, variable), gradient in zip(problem.variables.items(), gradients, strict=True):
        if not variable._backward_hooks:
            continue
        what = f"problem {problem.name!r}: a hook on its parameter {name!r}"
        begun, results = Randomness.capture(gradient.device, outside=True), list[Tensor]()
        with Touched(problem.variables) as touched:
            for _ in range(2):
                with replay(begun, gradient.device):
                    results.append(run_hooks(problem, name, variable, gradient.clone()))
        if not _same([results[0].detach()], [results[1].detach()]):
            raise ConfigError(
                f"{what} gives another gradient the second time, for the same one, so it depends on something that it "
                "changes itself, such as a count or an average; a hook must be a function of the gradient"
            )
        if touched.where is not None:
            raise ConfigError(
                f"{what} reads {touched.where}, {_NOT_MOVED}; write it as part of the loss (such as a penalty on "
                "self.params), or of the step in a subclass of the optimizer"
            )
        if leaves_of(results[0]) - {id(gradient)}:
            raise ConfigError(f"{what} depends on {_STRAY}")


def _refuse_containers(problem: Problem, slots: Sequence[Mapping[str, Any]]) -> None:
    for slot in slots:
        for key, value in slot.items():
            if not isinstance(value, Tensor) and any([isinstance(leaf, Tensor) for leaf in tree_leaves(value)]):
                raise ConfigError(
                    f"problem {problem.name!r}: {type(problem.optimizer).__name__} keeps a {type(value).__name__} of "
                    f"tensors in its state ({key!r}), which virtual steps and derivatives cannot follow; give each "
                    f"tensor a key of its own, as self.state[parameter]['{key}_0']"
                )


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether they are equal, up to the order in which a device may add."""
    if len(some) != len(others):
        return False
    return all([torch.allclose(a, b, 1e-4, 0.0, equal_nan=True) for a, b in zip(some, others, strict=True)])


def _any_gradients(problem: Problem) -> Vector:
    return tuple([torch.randn_like(variable, requires_grad=True) for variable in problem.variables.values()])


_NOT_MOVED = "which virtual steps do not move"
_STRAY = (
    "a tensor that requires gradients, besides what it is given, such as a parameter of another problem. Nothing is "
    "differentiated for it; use its .detach() if it may count as a constant, or make it part of the loss"
)
