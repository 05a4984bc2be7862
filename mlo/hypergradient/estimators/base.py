"""The base class of all estimators: an estimator pulls a cotangent back through the training of a lower problem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from mlo.levels.problem import Problem
from mlo.ops.vectors import Vector
from mlo.options.config import Config
from mlo.steps.hooks import refuse_parameter_hooks
from mlo.steps.step import Cotangents, Step


@dataclass(frozen=True)
class Recording:
    """What an engine keeps of a lower problem's steps for an estimator.

    Attributes:
        last: how many steps of a round, from its end; None: all.
        before: whether the state before each of them.
        graph: whether the graphs of their gradients, for exact products at these states.
        graph_bytes: memory for the graphs of all steps but the last one, whose graph is always kept.
        base: whether the last step's gradient also for what its loss read.
        every: of the states, every n-th; the others are recomputed.
        store_on: where the states are kept.
        fresh: whether the problem's next batches, for curvature at the solution.
    """

    last: int | None = 1
    before: bool = False
    graph: bool = False
    graph_bytes: float = 0.0
    base: bool = False
    every: int = 1
    store_on: Literal["device", "cpu"] = "device"
    fresh: bool = False

    @property
    def joins(self) -> bool:
        """Whether several steps may be one graph, without the states and gradients between them."""
        return self.graph and self.graph_bytes > 0 and self.every == 1 and self.store_on == "device"


class Estimator(Config, ABC):
    """How the derivative of a lower problem's solution, with respect to what its loss reads, is estimated.

    Subclasses define their options as fields, say in :attr:`recording` what they need, and implement :meth:`pull`.

    Attributes:
        differentiates: whether anything is pulled back at all.
        lookahead: the default of ``Engine(lookahead=...)`` with this estimator: whether upper problems step after
            virtual steps of the lower ones.
        remedy: what helps against a large ``residual`` (see :class:`Pulled`), for the warning about one.
    """

    differentiates: ClassVar[bool] = True
    lookahead: ClassVar[bool] = False
    remedy: ClassVar[str] = ""

    @property
    def recording(self) -> Recording:
        """What is kept of the steps; the default is the last step, without the state before it."""
        return Recording()

    @abstractmethod
    def pull(self, steps: Sequence[Step], cotangent: Vector, targets: Sequence[str], warm: Vector | None) -> Pulled:
        """Pull a cotangent of the problem's solution back onto the problems that its loss reads.

        Args:
            steps: the problem's recorded steps, in order.
            cotangent: the derivative of the upper loss with respect to the solution, one tensor per variable.
            targets: the problems onto which it is pulled back.
            warm: the ``solution`` of the last pullback for this one, if there was any.
        """

    def check(self, problem: Problem) -> None:
        """Raise a ConfigError if the estimator does not support ``problem``.

        By default it supports no hooks of parameters, which it would leave out. Override it in an estimator that
        transposes steps (:meth:`mlo.steps.step.Step.transpose`), hooks included.
        """
        refuse_parameter_hooks(problem, type(self).__name__)


@dataclass(frozen=True)
class Pulled:
    """The result of a pullback.

    Attributes:
        cotangents: {target: one tensor per variable of the target, or None if no gradient reaches it}.
        metrics: {name: scalar tensor}. The engine warns if one named "residual" is large: how much of a linear system
            is unsolved, from 0 (solved) to 1 (no better than zero) and beyond.
        solution: a warm start for the next pullback of the same problem, one tensor per variable.
    """

    cotangents: Cotangents
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    solution: Vector | None = None
