"""Losses, gradients and products as functions of tensors: what evaluations run, and what the compiler compiles."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mlo.errors import GraphError
from mlo.levels.problem import Problem
from mlo.levels.read_cache import ReadCache
from mlo.levels.state import State
from mlo.levels.substitution import Substitute
from mlo.ops.activation_checkpointing import end, recompute
from mlo.ops.vectors import Vector, aligned
from mlo.steps.level import Level
from mlo.steps.written import Unwritten

States = Mapping[str, State]
Found = Sequence[Tensor | None]


class Reading:
    """A context in which the problems that a level reads run in given states.

    Activation checkpointing inside it recomputes in these states, too; compiled code needs nothing for that.

    Args:
        reached: problems that the loss is differentiated for; the other reads are constants.
        cache: keeps the outputs of the problems read, but for those that are ``moving``.
    """

    def __init__(
        self,
        level: Level,
        states: States,
        reached: Collection[str],
        cache: ReadCache | None = None,
        moving: Collection[str] = (),
    ) -> None:
        self._level = level
        self._substitutes: list[tuple[Problem, Substitute]] = []
        for name, read in level.reads.items():
            kept = None if name in moving else cache
            substitute = Substitute(read.problem, states[name], name in reached, cache=kept)
            self._substitutes.append((read.problem, substitute))

    def __enter__(self) -> Reading:
        self._outside = None if torch.compiler.is_compiling() else recompute(self)
        for problem, substitute in self._substitutes:
            problem.substitute = substitute
        return self

    def __exit__(self, *error: object) -> None:
        for problem, _ in self._substitutes:
            problem.substitute = None
        if self._outside is not None:
            end(self._outside)

    def repeatable(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A part of the loss that can run again after it, with the substitutes of now."""
        problems = [self._level.problem, *[problem for problem, _ in self._substitutes]]
        substitutes = [problem.substitute for problem in problems]

        def run(*args: Any, **kwargs: Any) -> Any:
            outside = [problem.substitute for problem in problems]
            try:
                for problem, substitute in zip(problems, substitutes, strict=True):
                    problem.substitute = substitute
                with self.uncached():
                    return function(*args, **kwargs)
            finally:
                for problem, substitute in zip(problems, outside, strict=True):
                    problem.substitute = substitute

        return run

    @contextmanager
    def uncached(self) -> Iterator[None]:
        """A context in which the outputs of the problems read are not cached."""
        caches = [substitute.cache for _, substitute in self._substitutes]
        try:
            for _, substitute in self._substitutes:
                substitute.cache = None
            yield
        finally:
            for (_, substitute), cache in zip(self._substitutes, caches, strict=True):
                substitute.cache = cache

    def calls(self, own: int) -> list[int]:
        """How often each module ran: the level's ``own``, and those that it reads."""
        found = [own]
        for _, substitute in self._substitutes:
            found.append(substitute.calls)
        return found


def loss_at(level: Level, state: State, batch: Any) -> tuple[Tensor, Substitute]:
    """The loss of a level in ``state``: the only place that runs a user's loss; and the substitute for its module.

    Raises:
        GraphError: if the loss is not a scalar tensor, or if it writes into a parameter.
    """
    problem = level.problem
    own = problem.substitute = Substitute(problem, state, True, own=True)
    guard = nullcontext() if torch.compiler.is_compiling() or not level.repeats else Unwritten(level, state)
    try:
        with guard:
            loss: Any = problem.loss(batch, **level.arguments)
    finally:
        problem.substitute = None
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise GraphError(
            f"problem {level.name!r}: its loss returned {found}; return a scalar tensor (.mean() or .sum())"
        )
    return loss, own


def loss_of(
    level: Level,
    states: States,
    batch: Any,
    reached: Collection[str],
    cache: ReadCache | None = None,
    moving: Collection[str] = (),
    context: AbstractContextManager[Any] | None = None,
) -> tuple[Tensor, Vector, list[int]]:
    """The loss of a level where it and all that it reads are in ``states``.

    Args:
        reached, cache, moving: as for :class:`Reading`.
        context: that the loss is evaluated in.

    Returns:
        The loss, the module's buffers after it, and how often each module ran: its own, and those that it reads.
    """
    with Reading(level, states, reached, cache, moving) as reading, nullcontext() if context is None else context:
        loss, own = loss_at(level, states[level.name], batch)
    return loss, own.buffers, reading.calls(own.calls)


def gradient_of(
    level: Level,
    states: States,
    batch: Any,
    of: Sequence[str],
    reached: Collection[str],
    *,
    inputs: Vector | None = None,
    keep_graph: bool = False,
    scale: float | Tensor = 1.0,
    context: AbstractContextManager[Any] | None = None,
    cache: ReadCache | None = None,
    moving: Collection[str] = (),
    at_leaves: bool = False,
) -> tuple[Tensor, Found, Vector, list[int]]:
    """The loss of a level and its gradient, of one micro-batch.

    Only what needs another graph differentiates :func:`loss_of` by itself: :func:`gradient_for_reads`,
    :func:`mlo.steps.scan.scan` and the product ``forward``.

    Args:
        of: the problems for whose variables it is differentiated.
        inputs: what it is differentiated for instead of the level's own variables.
        keep_graph: keep the gradient's own graph.
        scale: of the loss, while its gradient is taken.
        at_leaves: differentiate for the outputs that the ``cache`` cuts out of the graph, too.
        batch, reached, cache, moving, context: as for :func:`loss_of`.

    Returns:
        The loss, its gradients in the order of ``of`` (None where it depends on nothing), and the rest of
        :func:`loss_of`.
    """
    loss, buffers, calls = loss_of(level, states, batch, reached, cache, moving, context)
    wanted: list[Tensor] = []
    for name in of:
        wanted += states[name].variables if inputs is None or name != level.name else inputs
    if at_leaves and cache is not None:
        wanted += cache.leaves
    found: Found = [None] * len(wanted)
    if wanted and loss.requires_grad:
        scaled = isinstance(scale, Tensor) or scale != 1.0
        by = loss * scale if scaled else loss
        found = torch.autograd.grad(by, wanted, create_graph=keep_graph, allow_unused=True)
        if scaled:
            found = [None if gradient is None else gradient / scale for gradient in found]
        if not keep_graph and level.device.type != "cpu":
            found = aligned(found, wanted)
    return loss, found, buffers, calls


def gradient_for_reads(
    level: Level,
    states: States,
    batch: Any,
    of: Sequence[str],
    reached: Collection[str],
    *,
    scale: float | Tensor = 1.0,
    context: AbstractContextManager[Any] | None = None,
) -> tuple[Tensor, Found, Vector, list[int]]:
    """:func:`gradient_of` for the level's own variables, with a graph that reaches only what the loss reads.

    A compiled backward computes its results for all inputs that require gradients. Here the variables do not. Of one
    that the loss does not depend on, the gradient is zero, not None.
    """
    own = states[level.name]
    calls: list[int] = []

    def scaled_loss(variables: Vector) -> tuple[Tensor, tuple[Tensor, Vector]]:
        at = {**states, level.name: own._replace(variables=variables)}
        loss, buffers, called = loss_of(level, at, batch, reached, context=context)
        calls.extend(called)
        return loss * scale, (loss.detach(), buffers)

    constants = tuple([variable.detach() for variable in own.variables])
    found, (loss, buffers) = torch.func.grad(scaled_loss, has_aux=True)(constants)
    if isinstance(scale, Tensor):
        found = [gradient / scale for gradient in found]
    return loss, found, buffers, calls


def product_of(
    level: Level,
    states: States,
    batch: Any,
    vector: Vector,
    of: Sequence[str],
    reached: Collection[str],
    **options: Any,
) -> tuple[Tensor, Found, Vector, list[int]]:
    """The derivative of <gradient in the level's own variables, vector> for the variables of the problems ``of``.

    Args:
        options: as for :func:`gradient_of`.
    """
    loss, gradient, buffers, calls = gradient_of(
        level, states, batch, (level.name,), reached, keep_graph=True, **options
    )
    inputs = [variable for name in of for variable in states[name].variables]
    found: Found = [None] * len(inputs)
    pairs = [(g, u) for g, u in zip(gradient, vector, strict=True) if g is not None and g.requires_grad]
    if pairs and inputs:
        found = torch.autograd.grad([g for g, _ in pairs], inputs, [u for _, u in pairs], allow_unused=True)
    return loss, found, buffers, calls
