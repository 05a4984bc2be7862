"""The options of the search phase: the space, its supernet, and how the levels are trained. Imports no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mlo import Config
from problems.data.options import Augmentation
from problems.nas import DARTS, P_DARTS, PC_DARTS, ArchitectureLogits, SearchSpace

SPACES = {"darts": DARTS, "pc_darts": PC_DARTS, "p_darts": P_DARTS}
Precision = Literal["float32", "bfloat16", "float16"]
DROPS = {"darts": (), "pc_darts": (), "p_darts": (3, 2)}


class Search(Config):
    """The space, its supernet, and how it, the student and the architecture are trained (the step counts are `steps`).

    A space that is searched in stages (P-DARTS) has a new supernet, architecture and student in each, of `steps`
    rounds, and fewer operations from one to the next.
    """

    space: Literal["darts", "pc_darts", "p_darts"] = Field("darts", description="the search space")
    operations: tuple[str, ...] | None = Field(
        None,
        description="the candidate operations, noise among them as a useless one; null: the space's eight",
    )
    partial: int | None = Field(
        None, ge=1, description="K, operations see 1/K of the channels; null: the space's own (4 for pc_darts)"
    )
    drops: tuple[int, ...] | None = Field(
        None, description="operations dropped on each edge between stages; null: the space's own ([3, 2] for p_darts)"
    )
    channels: int = Field(4, ge=1, description="channels of the supernet's first cell")
    cells: int | tuple[int, ...] = Field(3, description="cells of the supernet, or a list with those of each stage")
    skip_dropout: float | tuple[float, ...] = Field(
        0.0, description="first probability of dropout behind skip-connections, or a list with that of each stage"
    )
    warmup: int = Field(0, ge=0, description="rounds of each stage before the architecture's first step")
    batch_size: int = Field(50, ge=2, description="images in a batch, of each kind")
    learning_rate: float = Field(0.05, gt=0, description="of teacher and student; it decays along a cosine")
    last_learning_rate: float = Field(0.001, ge=0, description="learning rate at the end of the decay")
    architecture_learning_rate: float = Field(0.01, gt=0, description="of the architecture's Adam")
    architecture_clip: float | None = Field(
        None, gt=0, description="norm to which the architecture's gradient is clipped (5 in P-DARTS)"
    )
    augmentation: Augmentation = Field(Augmentation(), description="of all images in the search")
    precision: Precision = Field(
        "float32",
        description="autocast type of all losses; curvature products stay in float32 by default",
    )
    eigenvalue_every: int | None = Field(
        None,
        ge=1,
        description="rounds between two dominant eigenvalues of the validation loss's Hessian in the architecture; the "
        "search stops on it and goes back, as RobustDARTS; null: not watched",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        stages = len(self._drops) + 1
        for name in ("cells", "skip_dropout"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != stages:
                many = "1 stage" if stages == 1 else f"{stages} stages"
                raise ValueError(f"{name} has {len(value)} entries, but the search has {many}; give {stages}")
        if any(count < 3 for count in each_stage(self.cells, stages)):
            raise ValueError(
                "cells must be at least 3; a supernet of fewer has reduction cells alone, and no normal one"
            )
        if len(self.first_space.operations) < 2:
            raise ValueError("operations must be at least 2, or there is nothing to choose between")
        if any(not 0 <= p < 1 for p in each_stage(self.skip_dropout, stages)):
            raise ValueError("skip_dropout must be at least 0 and below 1")
        if sum(self._drops) >= len(self.first_space.operations):
            raise ValueError(
                f"drops {list(self._drops)} leave none of the {len(self.first_space.operations)} operations; drop fewer"
            )
        if self.channels % self.first_space.partial:
            raise ValueError(
                f"{self.channels} channels cannot be parted in {self.first_space.partial}; take a multiple of it"
            )
        return self

    @property
    def first_space(self) -> SearchSpace:
        """The space of the first stage."""
        space = SPACES[self.space]
        if self.operations is not None:
            space = replace(space, operations=self.operations)
        return space if self.partial is None else replace(space, partial=self.partial)

    @property
    def _drops(self) -> tuple[int, ...]:
        return DROPS[self.space] if self.drops is None else self.drops

    @property
    def stages(self) -> int:
        """The number of stages."""
        return len(self._drops) + 1

    def stage_space(self, found: list[ArchitectureLogits]) -> SearchSpace:
        """The space of a stage, given the logits that the stages before it found."""
        space = self.first_space
        for logits, drop in zip(found, self._drops, strict=False):
            space = space.narrow(logits, drop)
        return space


def each_stage(value: Any, stages: int) -> tuple[Any, ...]:
    """The values for all stages of an option that has one value for all, or a tuple with one for each."""
    return value if isinstance(value, tuple) else (value,) * stages
