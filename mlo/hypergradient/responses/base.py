"""What every response is: a way of pulling a cotangent back through the training of a lower problem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar

from torch import Tensor

from mlo.config import Config, Registered
from mlo.hypergradient.step import LastStep
from mlo.problem import Problem
from mlo.registry import RESPONSES
from mlo.vectors import Vector


class Response(Config, ABC):
    """How a lower problem's solution depends on what its loss reads; a subclass has its options.

    Attributes:
        differentiates: whether anything is pulled back at all.
        needs_before: whether the state before the last step must be kept for it.
        lookahead: whether upper problems step on virtual steps of the lower ones, unless the engine is told.
    """

    differentiates: ClassVar[bool] = True
    needs_before: ClassVar[bool] = False
    lookahead: ClassVar[bool] = False

    @abstractmethod
    def pull(self, step: LastStep, cotangent: Vector) -> Pulled:
        """From the cotangent of the problem's variables to those of what it reads.

        Args:
            step: the problem's last step.
            cotangent: one tensor per variable, the derivative of the upper loss for the solution.
        """

    def check(self, problem: Problem) -> None:
        """Raise a ConfigError if the response cannot go through ``problem``."""


class Pulled:
    """What a pullback gives.

    Attributes:
        cotangents: {target: one tensor per variable of it, or None if no gradient reaches it}.
        metrics: {name: scalar tensor}, about how well it went, such as the residual of a linear solve.
    """

    def __init__(self, cotangents: dict[str, Vector | None], metrics: dict[str, Tensor] | None = None) -> None:
        self.cotangents = cotangents
        self.metrics = metrics or {}


ResponseOption = Annotated[Response, Registered(RESPONSES)]
