"""What every estimator is: a way of pulling a cotangent back through the training of a lower problem."""

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
from mlo.steps.optimizer import OptimizerState, check_differentiable


class Estimator(Config, ABC):
    """How a lower problem's solution depends on what its loss reads; a subclass has its options.

    Attributes:
        differentiates: whether anything is pulled back at all.
        needs_before: whether the state before a step must be kept for it.
        lookahead: whether upper problems step on virtual steps of the lower ones, unless the engine is told.
    """

    differentiates: ClassVar[bool] = True
    needs_before: ClassVar[bool] = False
    lookahead: ClassVar[bool] = False

    @property
    def keeps_graph(self) -> bool:
        """Whether steps should keep their gradients' graphs, for exact products where they were taken from."""
        return False

    @property
    def graph_bytes(self) -> float:
        """Memory for such graphs of other steps than the last, whose is kept in any case."""
        return 0.0

    @property
    def in_one_graph(self) -> bool:
        """Whether steps may be recorded in one graph, and need neither states nor gradients of those in between."""
        return False

    def records(self, left: int) -> bool:
        """Whether a step is recorded after which ``left`` more are taken in the round."""
        return left == 0

    def stored(self, state: State, at: OptimizerState, index: int) -> tuple[State | None, OptimizerState | None]:
        """What is kept of what the ``index``-th recorded step is taken from, where that is needed."""
        return copied(state) if state.live else state, at

    @property
    def repeats(self) -> bool:
        """Whether recorded steps are taken again, from the values in the optimizer's state before them."""
        return False

    @property
    def takes_fresh_batches(self) -> bool:
        """Whether curvature at the solution is taken on the problem's next batches instead of its last step's."""
        return False

    @property
    def needs_base(self) -> bool:
        """Whether the last step should keep its gradients for what its loss reads."""
        return False

    @abstractmethod
    def pull(self, steps: Sequence[Step], cotangent: Vector) -> Pulled:
        """From the cotangent of the problem's variables to those of what it reads.

        Args:
            steps: the problem's recorded steps, the last one last.
            cotangent: one tensor per variable, the derivative of the upper loss for the solution.
        """

    def check(self, problem: Problem) -> None:
        """Raise a ConfigError if the estimator cannot go through ``problem``."""


class AtSolution(Estimator, ABC):
    """An estimator by the curvature at the present solution."""

    fresh_batch: bool = Field(
        False, description="take curvature on the problem's next batch, rather than on that of its last step"
    )

    @property
    def takes_fresh_batches(self) -> bool:
        """As the options have it."""
        return self.fresh_batch


class AlongSteps(Estimator, ABC):
    """An estimator by the derivative of recorded steps, through the user's own optimizer."""

    needs_before: ClassVar[bool] = True
    product: ProductOption = Field(Exact(), description="how curvature products are taken")

    @property
    def needs_base(self) -> bool:
        """As the product has it."""
        return self.product.needs_base

    @property
    def keeps_graph(self) -> bool:
        """As the product has it."""
        return self.product.keeps_graph

    def check(self, problem: Problem) -> None:
        """The optimizer's step must be differentiable."""
        check_differentiable(problem)


class Pulled:
    """What a pullback gives.

    Attributes:
        cotangents: {target: one tensor per variable of it, or None if no gradient reaches it}.
        metrics: {name: scalar tensor}, about how well it went, such as the residual of a linear solve.
        solution: left for the next pullback of the same problem to begin with.
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
