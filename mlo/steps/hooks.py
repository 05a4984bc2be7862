"""Hooks of parameters: what ``Tensor.register_hook`` makes of a gradient is the first part of an optimizer's step.

Hooks run on the gradient of a whole step, before clipping: in real steps, in virtual ones, and when a step is taken
again or differentiated. So curvature stays that of the loss, and a cotangent passes through the transposed hooks first.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from mlo.errors import ConfigError
from mlo.levels.problem import Problem, has_hooks
from mlo.ops.lost_graphs import LostGraphs

Gradients = Sequence[Tensor | None]
_POST_HOOKS = attrgetter("_post_accumulate_grad_hooks")


def hooked(problem: Problem, gradients: Gradients) -> Gradients:
    """The gradients that the hooks of the problem's variables make of these."""
    if not has_hooks(problem.variables):
        return gradients
    found = [*gradients]
    for index, (name, variable) in enumerate(problem.variables.items()):
        if variable._backward_hooks and (gradient := found[index]) is not None:
            found[index] = run_hooks(problem, name, variable, gradient.clone())
    return found


def transpose_hooks(problem: Problem, gradients: Gradients, cotangents: Sequence[Tensor]) -> Sequence[Tensor]:
    """Cotangents of the gradients, from those of what their hooks make of them.

    Raises:
        ConfigError: if a hook cannot be differentiated.
    """
    if not has_hooks(problem.variables):
        return cotangents
    found = [*cotangents]
    for index, (name, variable) in enumerate(problem.variables.items()):
        if variable._backward_hooks and (gradient := gradients[index]) is not None:
            leaf = gradient.detach().requires_grad_()
            with torch.enable_grad():
                begun = leaf.clone()
                with LostGraphs([begun]).follow() as seen:
                    after = run_hooks(problem, name, variable, begun)
            where = seen.where(after) or (seen.read if after is not begun or begun._version else None)
            if where is not None:
                raise ConfigError(
                    f"problem {problem.name!r}: a hook on its parameter {name!r} computes the gradient without a "
                    f"graph, by {where}, so it cannot be differentiated; compute it by operators with a graph, without "
                    "torch.no_grad, .data, detach, .item() and NumPy"
                )
            found[index] = torch.zeros_like(gradient)
            if after.requires_grad:
                given = cotangents[index].to(after.dtype)
                (found[index],) = torch.autograd.grad(after, leaf, given, allow_unused=True, materialize_grads=True)
    return found


def run_hooks(problem: Problem, name: str, variable: Tensor, gradient: Tensor) -> Tensor:
    """What the hooks of one variable make of its gradient, which they may write into."""
    hooks = variable._backward_hooks
    for hook in [*hooks.values()] if hooks else ():
        result = hook(gradient)
        if result is None:  # it may have written into the gradient
            continue
        if not isinstance(result, Tensor) or result.shape != gradient.shape:
            what = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else f"type {type(result).__name__}"
            raise ConfigError(
                f"problem {problem.name!r}: a hook on its parameter {name!r}, of shape {tuple(gradient.shape)}, "
                f"returns a gradient of {what}; return a tensor of the parameter's shape, or None"
            )
        gradient = result
    return gradient


def accumulated(problem: Problem, gradients: Gradients) -> Gradients:
    """What the hooks that torch runs after it has accumulated a gradient leave in ``.grad`` of each variable."""
    variables = [*problem.variables.values()]
    if not any(map(_POST_HOOKS, variables)):
        return gradients
    for variable, gradient in zip(variables, gradients, strict=True):
        variable.grad = None if gradient is None else gradient.clone()
    for variable in variables:
        hooks = variable._post_accumulate_grad_hooks
        for hook in [*hooks.values()] if hooks and variable.grad is not None else ():
            hook(variable)
    return [variable.grad for variable in variables]


def refuse_parameter_hooks(problem: Problem, estimator: str) -> None:
    """Raise a ConfigError for hooks on parameters, which an estimator would leave out."""
    hooked_ones = [repr(name) for name, variable in problem.variables.items() if variable._backward_hooks]
    if hooked_ones:
        raise ConfigError(
            f"problem {problem.name!r}: its parameter {', '.join(hooked_ones)} has a hook (register_hook), which "
            f"{estimator} leaves out; pass hypergradient='one_step' or 'unrolled', which differentiate it, or remove it"
        )


def refuse_module_hooks(problem: Problem) -> None:
    """Raise a ConfigError for backward hooks on modules.

    Torch runs them on each cotangent that passes, also while a gradient is differentiated. If they change gradients of
    a loss, what they make of its second derivatives is not the derivative of that.
    """
    for path, part in problem.module.named_modules():
        if part._backward_hooks or part._backward_pre_hooks:
            raise ConfigError(
                f"problem {problem.name!r}: {path or 'its module'!r} has a backward hook "
                "(register_full_backward_hook), which torch would run on second derivatives, too, where steps are "
                "differentiated; use Tensor.register_hook on parameters"
            )
