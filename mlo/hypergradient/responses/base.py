"""What every response is: a way of pulling a cotangent back through the training of a lower problem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from mlo.config import Config, Registered
from mlo.hypergradient.step import Step
from mlo.problem import Problem
from mlo.registry import RESPONSES
from mlo.vectors import Vector


class Response(Config, ABC):
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
    def recorded(self) -> int | None:
        """How many of the last steps of a round are recorded; None for all."""
        return 1

    @property
    def storage(self) -> Storage:
        """How the states before recorded steps are kept."""
        return Storage()

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
        """Raise a ConfigError if the response cannot go through ``problem``."""


@dataclass(frozen=True)
class Storage:
    """Where the states before recorded steps are kept: every ``every``-th, on ``device`` (None: where they are)."""

    every: int = 1
    device: torch.device | None = None


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
