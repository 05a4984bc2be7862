"""Substitution of parameters and buffers while a loss is evaluated, with a count of the module calls."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mlo.levels.problem import Problem
from mlo.levels.read_cache import ReadCache
from mlo.levels.state import State
from mlo.ops.vectors import Vector, copied


class Substitute:
    """What runs instead of the module of a problem in an evaluation: the module in another state.

    Args:
        problem: whose module it is.
        state: the tensors to run with.
        reached: whether the loss is differentiated for the variables; otherwise they are constants.
        own: whether it is the problem whose loss is evaluated: then :attr:`buffers` are as its calls leave them. What
            the calls of the others do to their buffers is discarded.
        cache: keeps the outputs of the calls for further evaluations; None: nothing does.

    Attributes:
        parameters: the variables, then the constants.
        calls: how often the module has run.
    """

    def __init__(
        self, problem: Problem, state: State, reached: bool, own: bool = False, cache: ReadCache | None = None
    ) -> None:
        self._problem, self._own, self.cache, self._reached = problem, own, cache, reached
        self.parameters: Vector = (*state.variables, *state.constants)
        if not reached:
            self.parameters = tuple([tensor.detach() for tensor in self.parameters])
        self._replaced = () if state.live and reached else self.parameters
        self.buffers: Vector = state.buffers
        self.calls = 0
        self._kept: list[Tensor] | None = None

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], cached: bool = True) -> Any:
        """The module's output, counted as a pass, or taken from the cache."""
        if cached and self.cache is not None:
            parameters = self.parameters if self._reached else ()
            return self.cache.run(self._problem.name, partial(self.run, cached=False), args, kwargs, parameters)
        self.calls += 1
        if self._own:
            if self._kept is None:
                self._kept = [*self._replaced, *(copied(self.buffers) if self.buffers else ())]
            output = self._problem.places.run(self._kept, args, kwargs)
            if self.buffers:
                self.buffers = self._problem.places.new_buffers(self.buffers, self._kept[len(self._replaced) :])
            return output
        parameters = self._replaced
        if not torch.is_grad_enabled():  # detached even where forward returns a parameter itself
            parameters = tuple([tensor.detach() for tensor in self.parameters])
        return self._problem.places.run([*parameters, *(copied(self.buffers) if self.buffers else ())], args, kwargs)
