"""The levels of a search: teacher, student and architecture, with their optimizers, schedules and data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

import mlo
from problems.data.splits import Splits
from problems.lbt import ArchValidate, StudentInTurn, StudentTeach, TeacherTrain
from problems.nas import Architecture, SearchSpace, Supernet, count_skips, entropy, stem_for
from problems.search.early_stop import Sharpness
from problems.search.options import Search, each_stage

AUTOCASTS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def supernet(search: Search, space: SearchSpace, stage: int, splits: Splits) -> Supernet:
    """The supernet of a stage; stage 0 is the first."""
    cells = each_stage(search.cells, search.stages)[stage]
    stem = stem_for(splits.image_size)
    return Supernet(space, search.channels, int(cells), splits.classes, splits.image_channels, stem)


def teacher(search: Search, space: SearchSpace, stage: int, steps: int, splits: Splits, **options: Any) -> TeacherTrain:
    """The teacher's level in a stage of `steps` rounds."""
    return _SearchedTeacher(
        "teacher",
        first_skip_dropout=float(each_stage(search.skip_dropout, search.stages)[stage]),
        total_steps=steps,
        frozen_steps=search.warmup,
        data=splits.train.batches(search.batch_size, search.augmentation),
        **options,
        **_training(search, supernet(search, space, stage, splits), steps),
    )


def student(
    search: Search,
    module: nn.Module,
    steps: int,
    splits: Splits,
    with_labels: bool,
    in_turn: bool = False,
    **options: Any,
) -> StudentTeach | StudentInTurn:
    """The student's level. It learns from pseudo-labels and, if ``with_labels``, from labels, together or in turn."""
    data: dict[str, Iterable[Any]] = {"unlabeled": splits.unlabeled.batches(search.batch_size, search.augmentation)}
    if with_labels:
        data["labeled"] = splits.train.batches(search.batch_size, search.augmentation)
    if not in_turn:
        return StudentTeach("student", data=data, **options, **_training(search, module, steps))
    each = 1 + with_labels
    twice = {name: Repeated(batches, each) for name, batches in data.items()}
    return StudentInTurn(
        "student", data=twice, labeled=with_labels, **options, **_training(search, module, steps, each)
    )


def architecture(
    search: Search, space: SearchSpace, splits: Splits, capturable: bool = False, **options: Any
) -> ArchValidate:
    """The architecture's level, which also logs the weights of the operations.

    ``capturable``: whether Adam counts its steps on the GPU, as a CUDA graph needs it.
    """
    module = Architecture(space)
    if search.eigenvalue_every is not None:
        module.add_module("sharpness", Sharpness(search.eigenvalue_every))
    rate = search.architecture_learning_rate
    return _LoggedArchitecture(
        "arch",
        space=space,
        module=module,
        optimizer=Adam(module.parameters(), lr=rate, betas=(0.5, 0.999), weight_decay=1e-3, capturable=capturable),
        data=splits.validation.batches(search.batch_size, search.augmentation),
        warmup=search.warmup,
        clip_norm=search.architecture_clip,
        autocast=AUTOCASTS[search.precision],
        **options,
    )


def _training(search: Search, module: nn.Module, steps: int, each: int = 1) -> dict[str, Any]:
    """The arguments that teacher and student share: SGD with a cosine over the stage, with `each` steps a round."""
    rate = search.learning_rate
    optimizer = SGD(module.parameters(), lr=rate, momentum=0.9, weight_decay=3e-4)
    last = min(search.last_learning_rate, rate)
    scheduler: LRScheduler = CosineAnnealingLR(optimizer, steps, eta_min=last)
    if each > 1:
        scheduler = LambdaLR(optimizer, lambda step: cosine(step // each / steps, last / rate))
    return {
        "module": module,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "clip_norm": 5.0,
        "autocast": AUTOCASTS[search.precision],
    }


def cosine(done: float, last: float) -> float:
    """The factor of a learning rate that decays from 1 to `last` along half a cosine; `done` runs from 0 to 1."""
    return last + (1 - last) * (1 + math.cos(math.pi * done)) / 2


class Repeated:
    """Data in which each batch is repeated `times` times in a row."""

    def __init__(self, batches: Iterable[Any], times: int) -> None:
        self._batches = batches
        self._times = times

    def __iter__(self) -> Iterator[Any]:
        """One pass over the data."""
        for batch in self._batches:
            yield from itertools.repeat(batch, self._times)


def skip_dropout_at(first: float, done: int, total: int, frozen: int, epochs: int = 25) -> float:
    """P-DARTS' dropout probability after skip-connections, after `done` of `total` steps.

    The steps are mapped to 25 epochs. During the first `frozen` steps, in which the architecture does not change, the
    probability decays linearly, towards 0 at the end of the 25 epochs. Then it starts again from `first`, and is
    multiplied by exp(-0.2) in each epoch (Chen et al. 2019, section 3.3, with the schedule of their code).
    """
    epoch, warm = epochs * done // total, epochs * frozen // total
    if done < frozen:
        return first * (epochs - epoch - 1) / epochs
    return first * math.exp(-0.2 * (epoch - warm))


class _SearchedTeacher(TeacherTrain):
    """The teacher of a search; dropout after skip-connections in its supernet decays."""

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


class _LoggedArchitecture(ArchValidate):
    """The architecture's level, with metrics that show when skip-connections take over."""

    def __init__(self, name: str, *, space: SearchSpace, **problem: Any) -> None:
        super().__init__(name, **problem)
        self.space = space

    def metrics(self) -> Mapping[str, Tensor]:
        """Mean weight of each operation, entropy of the weights, and skip-connections that would be kept.

        Also the dominant eigenvalue, in rounds that have one.
        """
        logits = self.module()
        found: dict[str, Tensor] = {}
        for kind, matrix in logits._asdict().items():
            means = self.space.mixture(kind, matrix.detach()).operations.mean(dim=0)
            found |= {f"{kind}/{name}": mean for name, mean in zip(self.space.operations, means, strict=True)}
        found |= {f"{kind}/entropy": value for kind, value in entropy(self.space, logits).items()}
        record = getattr(self.module, "sharpness", None)
        eigenvalue = record.latest() if isinstance(record, Sharpness) else None
        found |= {} if eigenvalue is None else {"eigenvalue": eigenvalue}
        return found | {"skips": logits.normal.new_tensor(float(count_skips(self.space, logits)))}
