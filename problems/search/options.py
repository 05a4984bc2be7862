"""The options of the search phase: space, supernet, and training of the levels. Does not import torch."""

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
    """The search space, its supernet, and how supernet, student and architecture are trained.

    The job's `steps` is the number of rounds in a stage. P-DARTS has several stages: each has a new supernet,
    architecture and student, and fewer operations than the stage before.
    """

    space: Literal["darts", "pc_darts", "p_darts"] = Field("darts", description="the search space")
    operations: tuple[str, ...] | None = Field(
        None,
        description="names of the candidate operations; noise adds a useless one; null: the space's own eight",
    )
    partial: int | None = Field(
        None, ge=1, description="K: operations see 1/K of the channels; null: the space's own (4 for pc_darts, else 1)"
    )
    drops: tuple[int, ...] | None = Field(
        None,
        description="operations dropped on each edge after each stage but the last; null: the space's own ([3, 2] for "
        "p_darts)",
    )
    channels: int = Field(4, ge=1, description="channels of the supernet's first cell")
    cells: int | tuple[int, ...] = Field(
        3, description="cells of the supernet; if the search has stages, also a list with one number for each"
    )
    skip_dropout: float | tuple[float, ...] = Field(
        0.0, description="initial probability of dropout after skip-connections, or a list with one for each stage"
    )
    warmup: int = Field(0, ge=0, description="rounds of each stage before the architecture's first step")
    batch_size: int = Field(50, ge=2, description="images in each batch (training, validation, unlabeled)")
    learning_rate: float = Field(0.05, gt=0, description="learning rate of teacher and student; decays along a cosine")
    last_learning_rate: float = Field(
        0.001, ge=0, description="learning rate of teacher and student at the end of a stage"
    )
    architecture_learning_rate: float = Field(0.01, gt=0, description="learning rate of the architecture's Adam")
    architecture_clip: float | None = Field(
        None, gt=0, description="clip the architecture's gradient to this norm (5 in P-DARTS); null: no clipping"
    )
    augmentation: Augmentation = Field(Augmentation(), description="augmentation of the training and unlabeled images")
    precision: Precision = Field(
        "float32",
        description="autocast type of all losses; curvature products stay in float32 by default",
    )
    non_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="what a NaN or infinite loss or gradient does; stop: it is an error; skip: its round is undone and "
        "counted (skipped_rounds), which copies all networks before each round",
    )
    tf32: bool | None = Field(
        None,
        description="whether float32 losses may use TensorFloat-32 on a GPU, curvature products aside; null: as torch "
        "is set, which is yes for convolutions",
    )
    eigenvalue_every: int | None = Field(
        None,
        ge=1,
        description="every so many rounds, compute the dominant eigenvalue of the validation loss's Hessian in the "
        "architecture, and stop a stage when it grows too much (RobustDARTS); null: never",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        stages = len(self._drops) + 1
        for name in ("cells", "skip_dropout"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != stages:
                many = "1 stage" if stages == 1 else f"{stages} stages"
                raise ValueError(
                    f"{name} has {len(value)} entries, but the search has {many}; write {stages}, or one number for all"
                )
        if any(count < 3 for count in each_stage(self.cells, stages)):
            raise ValueError(
                "cells must be at least 3; with fewer, a supernet has only reduction cells and no normal one"
            )
        if len(self.first_space.operations) < 2:
            raise ValueError(
                "operations has fewer than two names, so there is nothing to choose between; write at least two"
            )
        if any(not 0 <= p < 1 for p in each_stage(self.skip_dropout, stages)):
            raise ValueError("skip_dropout must be at least 0 and below 1, since it is a probability")
        if sum(self._drops) >= len(self.first_space.operations):
            raise ValueError(
                f"drops {list(self._drops)} leaves no operation, since there are {len(self.first_space.operations)}; "
                "drop fewer"
            )
        if self.channels % self.first_space.partial:
            raise ValueError(
                f"channels: {self.channels} cannot be divided by {self.first_space.partial} (partial); write a "
                f"multiple of {self.first_space.partial}"
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
        """The space of the next stage, given the final logits of the stages before it."""
        space = self.first_space
        for logits, drop in zip(found, self._drops, strict=False):
            space = space.narrow(logits, drop)
        return space


def each_stage(value: Any, stages: int) -> tuple[Any, ...]:
    """One value for each stage, from an option that is a tuple of them or one value for all stages."""
    return value if isinstance(value, tuple) else (value,) * stages
