"""The base class of all estimators: an estimator pulls a cotangent back through the training of a lower problem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from mlo.hypergradient.products import Exact, ProductOption
from mlo.hypergradient.step import Step, copied
from mlo.levels.problem import Problem, State
from mlo.ops.vectors import Vector
from mlo.options.config import Config
from mlo.steps.optimizer import check_differentiable
from mlo.steps.optimizer_state import OptimizerState


class Estimator(Config, ABC):
    """How the derivative of a lower problem's solution, with respect to what its loss reads, is estimated.

    Subclasses define their options as fields, and implement :meth:`pull`.

    Attributes:
        differentiates: whether anything is pulled back at all.
        needs_before: whether the engine must keep the state before each recorded step.
        lookahead: the default of ``Engine(lookahead=...)`` with this estimator: whether upper problems step after
            virtual steps of the lower ones.
    """

    differentiates: ClassVar[bool] = True
    needs_before: ClassVar[bool] = False
    lookahead: ClassVar[bool] = False

    @property
    def keeps_graph(self) -> bool:
        """Whether steps should keep the graphs of their gradients, for exact products at the states before them."""
        return False

    @property
    def graph_bytes(self) -> float:
        """Memory in bytes for the graphs of all steps but the last one, whose graph is always kept."""
        return 0.0

    @property
    def in_one_graph(self) -> bool:
        """Whether several steps may be recorded in one graph, without the states and gradients between them."""
        return False

    def records(self, left: int) -> bool:
        """Whether a step is recorded if ``left`` more steps follow it in the round."""
        return left == 0

    def stored(
        self, state: State, optimizer_state: OptimizerState, index: int
    ) -> tuple[State | None, OptimizerState | None]:
        """What to keep of the states before the ``index``-th recorded step, if :attr:`needs_before`."""
        return copied(state) if state.live else state, optimizer_state

    @property
    def repeats(self) -> bool:
        """Whether dropped states are recomputed, which needs the optimizer's state at the stored ones."""
        return False

    @property
    def takes_fresh_batches(self) -> bool:
        """Whether curvature at the solution uses the problem's next batches instead of those of its last step."""
        return False

    @property
    def needs_base(self) -> bool:
        """Whether the last step should keep its gradients with respect to what its loss reads."""
        return False

    @abstractmethod
    def pull(self, steps: Sequence[Step], cotangent: Vector) -> Pulled:
        """Pull a cotangent of the problem's solution back onto the problems that its loss reads.

        Args:
            steps: the problem's recorded steps, in order.
            cotangent: the derivative of the upper loss with respect to the solution, one tensor per variable.

        Returns:
            The cotangents of the problems in ``steps[-1].targets``.
        """

    def check(self, problem: Problem) -> None:
        """Raise a ConfigError if the estimator does not support ``problem``."""


class AtSolution(Estimator, ABC):
    """An estimator that uses the curvature at the current solution."""

    fresh_batch: bool = Field(
        False, description="compute curvature on the problem's next batch instead of the batch of its last step"
    )

    @property
    def takes_fresh_batches(self) -> bool:
        """The option ``fresh_batch``."""
        return self.fresh_batch


class AlongSteps(Estimator, ABC):
    """An estimator that differentiates recorded steps of the user's own optimizer."""

    needs_before: ClassVar[bool] = True
    product: ProductOption = Field(Exact(), description="how curvature products are computed")

    @property
    def needs_base(self) -> bool:
        """Whether the product needs them."""
        return self.product.needs_base

    @property
    def keeps_graph(self) -> bool:
        """Whether the product uses them."""
        return self.product.keeps_graph

    def check(self, problem: Problem) -> None:
        """Raise a ConfigError if a step of the problem's optimizer is not differentiable."""
        check_differentiable(problem)


class Pulled:
    """The result of a pullback.

    Attributes:
        cotangents: {target: one tensor per variable of the target, or None if no gradient reaches it}.
        metrics: {name: scalar tensor}, such as the residual of a linear solve.
        solution: a warm start for the next pullback of the same problem, one tensor per variable.
    """

    def __init__(
        self,
        cotangents: dict[str, Vector | None],
        metrics: dict[str, Tensor] | None = None,
        solution: Vector | None = None,
    ) -> None:
        self.cotangents = cotangents
        self.metrics = metrics or {}
        self.solution = solution
