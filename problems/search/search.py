"""The search phase: options, stages, and the engine of a stage, by Learning by Teaching or by the plain method."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

import mlo
from mlo.options.config import Config
from problems.data.augmentation import Augmentation
from problems.data.splits import Splits
from problems.lbt import ArchValidate, StudentInTurn, StudentTeach, TeacherTrain
from problems.nas import (
    DARTS,
    P_DARTS,
    PC_DARTS,
    Architecture,
    ArchitectureLogits,
    SearchSpace,
    StemName,
    Supernet,
)
from problems.nas.search_diagnostics import count_skips, entropy
from problems.search.early_stop import Sharpness

SPACES = {"darts": DARTS, "pc_darts": PC_DARTS, "p_darts": P_DARTS}
Precision = Literal["float32", "bfloat16", "float16"]
AUTOCASTS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
DROPS = {"darts": (), "pc_darts": (), "p_darts": (3, 2)}


class Search(Config):
    """The space, its supernet, and how it, the student and the architecture are trained (the step counts are `steps`).

    A space that is searched in stages (P-DARTS) has a new supernet, architecture and student in each, of `steps`
    rounds, and fewer operations from one to the next.
    """

    space: Literal["darts", "pc_darts", "p_darts"] = Field("darts", description="the search space")
    operations: tuple[str, ...] | None = Field(
        None, description="the operations that compete, and noise where a bad one is wanted; null: the space's eight"
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
    learning_rate: float = Field(0.05, gt=0, description="of teacher and student, decaying by a cosine")
    last_learning_rate: float = Field(0.001, ge=0, description="what it decays to")
    architecture_learning_rate: float = Field(0.01, gt=0, description="of the architecture's Adam")
    architecture_clip: float | None = Field(
        None, gt=0, description="the norm its gradient is clipped to (5 in P-DARTS)"
    )
    augmentation: Augmentation = Field(Augmentation(), description="of all images in the search")
    precision: Precision = Field(
        "float32", description="of all losses, under autocast; curvature products stay in float32 unless they are told"
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
        if any(count < 3 for count in _each(self.cells, stages)):
            raise ValueError(
                "cells must be at least 3; a supernet of fewer has reduction cells alone, and no normal one"
            )
        if len(self.first_space.operations) < 2:
            raise ValueError("operations must be at least 2, or there is nothing to choose between")
        if any(not 0 <= p < 1 for p in _each(self.skip_dropout, stages)):
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
        """How many there are."""
        return len(self._drops) + 1

    def stage_space(self, found: list[ArchitectureLogits]) -> SearchSpace:
        """The space of a stage, of the logits that the stages before it found."""
        space = self.first_space
        for logits, drop in zip(found, self._drops, strict=False):
            space = space.narrow(logits, drop)
        return space

    def supernet(self, space: SearchSpace, stage: int, splits: Splits) -> Supernet:
        """The supernet of a stage, 0 the first."""
        cells = _each(self.cells, self.stages)[stage]
        stem = stem_for(splits.image_size)
        return Supernet(space, self.channels, int(cells), splits.classes, splits.image_channels, stem)

    def teacher(self, space: SearchSpace, stage: int, steps: int, splits: Splits, **options: Any) -> TeacherTrain:
        """The teacher's level in a stage of `steps` rounds."""
        return _SearchedTeacher(
            "teacher",
            first_skip_dropout=float(_each(self.skip_dropout, self.stages)[stage]),
            total_steps=steps,
            frozen_steps=self.warmup,
            data=splits.train.batches(self.batch_size, self.augmentation),
            **options,
            **self.trained(self.supernet(space, stage, splits), steps),
        )

    def student(
        self, module: nn.Module, steps: int, splits: Splits, with_labels: bool, in_turn: bool = False, **options: Any
    ) -> StudentTeach | StudentInTurn:
        """The student's level; it learns from pseudo-labels, and from labels too if so asked, at once or in turn."""
        data: dict[str, Iterable[Any]] = {"unlabeled": splits.unlabeled.batches(self.batch_size, self.augmentation)}
        if with_labels:
            data["labeled"] = splits.train.batches(self.batch_size, self.augmentation)
        if not in_turn:
            return StudentTeach("student", data=data, **options, **self.trained(module, steps))
        each = 1 + with_labels
        twice = {name: Repeated(batches, each) for name, batches in data.items()}
        return StudentInTurn("student", data=twice, labeled=with_labels, **options, **self.trained(module, steps, each))

    def architecture(self, space: SearchSpace, splits: Splits, **options: Any) -> ArchValidate:
        """The architecture's level, which reports what becomes of the operations."""
        module = Architecture(space)
        if self.eigenvalue_every is not None:
            module.add_module("sharpness", Sharpness(self.eigenvalue_every))
        rate = self.architecture_learning_rate
        return _WatchedArchitecture(
            "arch",
            space=space,
            module=module,
            optimizer=Adam(module.parameters(), lr=rate, betas=(0.5, 0.999), weight_decay=1e-3),
            data=splits.validation.batches(self.batch_size, self.augmentation),
            warmup=self.warmup,
            clip_norm=self.architecture_clip,
            autocast=AUTOCASTS[self.precision],
            **options,
        )

    def trained(self, module: nn.Module, steps: int, each: int = 1) -> dict[str, Any]:
        """What teacher and student have in common: SGD with a cosine over the stage, of `each` steps a round."""
        rate = self.learning_rate
        optimizer = SGD(module.parameters(), lr=rate, momentum=0.9, weight_decay=3e-4)
        last = min(self.last_learning_rate, rate)
        scheduler: LRScheduler = CosineAnnealingLR(optimizer, steps, eta_min=last)
        if each > 1:
            scheduler = LambdaLR(optimizer, lambda step: cosine(step // each / steps, last / rate))
        return {
            "module": module,
            "optimizer": optimizer,
            "scheduler": scheduler,
            "clip_norm": 5.0,
            "autocast": AUTOCASTS[self.precision],
        }


def _each(value: Any, stages: int) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,) * stages


def cosine(done: float, last: float) -> float:
    """The factor of a rate that decays from 1 to `last` by half a cosine, after a part `done` of the way."""
    return last + (1 - last) * (1 + math.cos(math.pi * done)) / 2


class Repeated:
    """Data each of whose batches comes `times` times in a row."""

    def __init__(self, batches: Iterable[Any], times: int) -> None:
        self._batches = batches
        self._times = times

    def __iter__(self) -> Iterator[Any]:
        """Batch by batch, once through the data."""
        for batch in self._batches:
            yield from itertools.repeat(batch, self._times)


def stem_for(image_size: int) -> StemName:
    """The stem for images of this height: ImageNet's, which quarters and then halves them, above 64 pixels."""
    return "cifar" if image_size <= 64 else "imagenet"


def skip_dropout_at(first: float, done: int, total: int, frozen: int, epochs: int = 25) -> float:
    """P-DARTS' dropout behind skip-connections after `done` of `total` steps, taken for 25 epochs.

    While the architecture is frozen it decays linearly to where it would end at 25 epochs, and afterwards from the
    first value again by exp(-0.2) an epoch (Chen et al. 2019, section 3.3, with the schedule of their code).
    """
    epoch, warm = epochs * done // total, epochs * frozen // total
    if done < frozen:
        return first * (epochs - epoch - 1) / epochs
    return first * math.exp(-0.2 * (epoch - warm))


class _SearchedTeacher(TeacherTrain):
    """The teacher of a search, whose supernet's dropout behind skip-connections decays."""

    def __init__(self, name: str, *, first_skip_dropout: float, total_steps: int, frozen_steps: int, **problem: Any):
        super().__init__(name, **problem)
        self.first_skip_dropout = first_skip_dropout
        self.total_steps, self.frozen_steps = total_steps, frozen_steps

    def loss(self, batch: Any, arch: mlo.Problem) -> Tensor:
        """The teacher's training loss."""
        if self.first_skip_dropout:
            assert isinstance(self.module, Supernet)
            done = min(self.steps_taken, self.total_steps - 1)
            self.module.skip_dropout = skip_dropout_at(
                self.first_skip_dropout, done, self.total_steps, self.frozen_steps
            )
        return super().loss(batch, arch)


class _WatchedArchitecture(ArchValidate):
    """The architecture's level, which reports what the known failure, skip-connections taking over, looks like."""

    def __init__(self, name: str, *, space: SearchSpace, **problem: Any) -> None:
        super().__init__(name, **problem)
        self.space = space

    def metrics(self) -> Mapping[str, Tensor]:
        """Mean weight of each operation over the edges, entropy of the weights, skip-connections that would be kept.

        And the dominant eigenvalue, where it was taken in this round.
        """
        logits = self.module()
        found: dict[str, Tensor] = {}
        for kind, matrix in logits._asdict().items():
            means = self.space.mixture(kind, matrix.detach()).operations.mean(dim=0)
            found |= {f"{kind}/{name}": mean for name, mean in zip(self.space.operations, means, strict=True)}
        found |= {f"{kind}/entropy": value for kind, value in entropy(self.space, logits).items()}
        watched = getattr(self.module, "sharpness", None)
        eigenvalue = watched.latest() if isinstance(watched, Sharpness) else None
        found |= {} if eigenvalue is None else {"eigenvalue": eigenvalue}
        return found | {"skips": logits.normal.new_tensor(float(count_skips(self.space, logits)))}
