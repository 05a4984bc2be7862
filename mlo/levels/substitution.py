"""Substitution of parameters and buffers while a loss is evaluated, with a count of the module calls."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mlo.errors import GraphError
from mlo.levels.buffer_checks import refuse_reshaped
from mlo.levels.problem import Problem, State
from mlo.levels.read_cache import ReadCache


def loss_with(
    problems: Mapping[str, Problem], name: str, substitutes: Mapping[str, OwnSubstitute | ReadSubstitute], batch: Any
) -> Tensor:
    """The loss of a problem, with substitutes for its module and the modules of the problems that it reads."""
    try:
        for other, substitute in substitutes.items():
            problems[other].substitute(substitute)
        return loss_within(problems, name, batch)
    finally:
        for other in substitutes:
            problems[other].substitute(None)


def loss_within(problems: Mapping[str, Problem], name: str, batch: Any) -> Tensor:
    """The loss of a problem with the current substitutes.

    Raises:
        GraphError: if it is not a scalar tensor.
    """
    problem = problems[name]
    loss: Any = problem.loss(batch, **{argument: problems[read] for argument, read in problem.arguments.items()})
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise GraphError(f"problem {name!r}: its loss returned {found}; return a scalar tensor (.mean() or .sum())")
    return loss


class OwnSubstitute:
    """The substitute for the module of the problem whose loss is evaluated."""

    def __init__(self, state: State, passes: MutableMapping[str, int], kind: str) -> None:
        self.parameters = state.parameters
        self.buffers = {name: buffer.clone() for name, buffer in state.buffers.items()}
        self._substitutes = dict(self.buffers) if state.live else {**state.parameters, **self.buffers}
        self._passes = passes
        self._kind = kind

    def run(self, problem: Problem, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output, counted as a pass; ``buffers`` are then as the call left them."""
        self._passes[self._kind] += 1
        output = problem.run_with(self._substitutes, args, kwargs)
        left = {}
        for name, before in self.buffers.items():
            after = self._substitutes[name]
            refuse_reshaped(problem.name, name, before, after)
            left[name] = after.detach()
        self.buffers = left
        return output


class ReadSubstitute:
    """The substitute for the module of a problem that the loss reads; changes of its buffers are discarded."""

    def __init__(
        self,
        state: State,
        passes: MutableMapping[str, int],
        kind: str,
        differentiate: bool,
        read_cache: ReadCache | None,
        device: torch.device,
    ) -> None:
        self._buffers = state.buffers
        self._differentiate = differentiate
        if differentiate:
            self.parameters: Mapping[str, Tensor] = state.parameters
        else:
            self.parameters = {name: parameter.detach() for name, parameter in state.parameters.items()}
        self._passes = passes
        self._kind = kind
        self._read_cache = read_cache
        self._device = device

    def run(self, problem: Problem, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output, counted as a pass, or taken from the read cache."""
        if self._read_cache is None:
            return self._forward(problem, args, kwargs)
        parameters = tuple(self.parameters.values()) if self._differentiate else ()
        forward = partial(self._forward, problem)
        return self._read_cache.run(problem.name, forward, args, kwargs, parameters, self._device)

    def _forward(self, problem: Problem, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._passes[self._kind] += 1
        buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        parameters = self.parameters
        if not torch.is_grad_enabled():  # detached even where forward returns a parameter itself
            parameters = {name: parameter.detach() for name, parameter in parameters.items()}
        return problem.run_with({**parameters, **buffers}, args, kwargs)
