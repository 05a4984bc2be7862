"""The search that is measured: Learning by Teaching as `mlo run lbt` runs it at the paper's size, on random images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import mlo
from benchmarks.gpu.sections import ROUNDS
from benchmarks.lbt_step import Task, make_task
from problems.data.images import ArrayPixels, Part
from problems.data.options import Augmentation
from problems.lbt import ArchValidate, StudentTeach, TeacherTrain
from problems.search.students import make_student

CLIP_NORM = 5.0


class Size(NamedTuple):
    """Of networks, batches and data: the number of stored images in each part."""

    channels: int
    cells: int
    batch: int
    image: int
    student: str
    stored: int


PAPER, SMOKE = Size(16, 8, 64, 32, "resnet18", 25_000), Size(2, 3, 2, 8, "small", 16)


def new_task(size: Size, device: torch.device) -> Task:
    """The three networks, and one batch of each kind, on a device."""
    with device:
        return make_task(
            lambda: make_student(size.student, 3, 10, size.image),
            channels=size.channels,
            cells=size.cells,
            batch=size.batch,
            size=size.image,
        )


def search_engine(
    size: Size,
    device: torch.device,
    *,
    student: bool = True,
    dropout: float = 0.0,
    autocast: torch.dtype | None = None,
    hypergradient: object = "darts",
    compile: bool = False,
    capture: bool = False,
) -> mlo.Engine:
    """The engine of a search, with augmented batches, clipping and a schedule of the learning rates.

    Args:
        size: of networks and data.
        device: of the engine and of the stored images.
        student: whether there is one; without it this is second-order DARTS.
        dropout: of the student's logits.
        autocast: of all three losses.
        hypergradient: see :class:`mlo.Engine`; with lookahead in any case.
        compile, capture: see :class:`mlo.Engine`.
    """
    task = new_task(size, device)
    batches = [_images(size, device, seed) for seed in range(3)]
    optimizers = task.optimizers(capturable=capture)
    trained: list[dict[str, Any]] = [
        {
            "optimizer": optimizer,
            "scheduler": CosineAnnealingLR(optimizer, ROUNDS, eta_min=0.001),
            "clip_norm": CLIP_NORM,
            "autocast": autocast,
        }
        for optimizer in optimizers[:2]
    ]
    levels: list[mlo.Problem] = [TeacherTrain("teacher", module=task.teacher, data=batches[0], **trained[0])]
    if student:
        taught = {"labeled": batches[0], "unlabeled": batches[1]}
        module = nn.Sequential(task.student, nn.Dropout(dropout)) if dropout else task.student
        levels.append(StudentTeach("student", module=module, data=taught, **trained[1]))
    judging: dict[str, Any] = {"data": batches[2], "optimizer": optimizers[2], "autocast": autocast}
    reads = {} if student else {"student": None}
    levels.append(ArchValidate("arch", module=task.architecture, reads=reads, **judging))
    how: dict[str, Any] = {"compile": compile, "capture": capture, "device": device}
    return mlo.Engine(levels, hypergradient, lookahead=True, **how)


def _images(size: Size, device: torch.device, seed: int) -> Iterable[Any]:
    """Batches of random images of ten classes, cropped and flipped; the images are stored on the device."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (size.stored, 3, size.image, size.image), generator=generator, dtype=torch.uint8)
    part = Part.of(ArrayPixels(pixels.to(device)), torch.arange(size.stored) % 10)
    half = torch.full((3,), 0.5)
    return part.normalized(half, half / 2).batches(size.batch, Augmentation(crop=size.image // 8, flip=True))
