"""Labeled images behind one interface, whether they lie in memory or in files, and the batches that come of them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from mlo import ConfigError, distributed
from problems.data.augmentation import Transforms, make_transforms
from problems.data.options import Augmentation

RESIZED = 256 / 224  # images in files are resized to this part of the side that is then cut from their centre
Key: TypeAlias = tuple[Tensor, int]  # the positions of a batch's images in their part, and the seed of its draws


class Images(NamedTuple):
    """Images as networks take them, (B, C, H, W) of normalized float32, and their labels, (B,) of int64."""

    images: Tensor
    labels: Tensor


class Pixels(Protocol):
    """Images as they are stored; values are read as float32 in [0, 1]."""

    @property
    def image_channels(self) -> int:
        """C of what :meth:`read` returns."""

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W) of what :meth:`read` returns."""

    @property
    def device(self) -> torch.device:
        """Where :meth:`read` puts them."""

    def read(self, rows: Tensor, framing: v2.Transform | None = None) -> Tensor:
        """The images in these rows, (B, C, H, W); ``framing`` cuts each (C, any, any) to (C, H, W) in its own way."""


@dataclass(frozen=True)
class ArrayPixels:
    """Images in memory: (N, C, H, W) of uint8, or of float in [0, 1], on any device."""

    array: Tensor

    @property
    def image_channels(self) -> int:
        """C."""
        return self.array.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        return self.array.shape[2], self.array.shape[3]

    @property
    def device(self) -> torch.device:
        """The array's."""
        return self.array.device

    def read(self, rows: Tensor, framing: v2.Transform | None = None) -> Tensor:
        """Cut on the array's device."""
        images = self.array[rows.to(self.device)]
        images = images if images.is_floating_point() else images.float() / 255
        return images if framing is None else torch.stack([framing(image) for image in images])


class FilePixels:
    """Images in files, decoded to three channels when they are read; on the CPU.

    Without a framing, the shorter side is resized to 256/224 of ``image_size`` and the centre is cut out.
    """

    def __init__(self, paths: Sequence[str], image_size: int) -> None:
        self._paths = np.array([os.fsencode(path) for path in paths])  # bytes: shared by loader processes, not copied
        self._size = image_size
        self._centre = v2.Compose([v2.Resize(round(RESIZED * image_size)), v2.CenterCrop(image_size)])

    @property
    def image_channels(self) -> int:
        """3."""
        return 3

    @property
    def shape(self) -> tuple[int, int]:
        """(image_size, image_size)."""
        return self._size, self._size

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def read(self, rows: Tensor, framing: v2.Transform | None = None) -> Tensor:
        """Decode and frame.

        Raises:
            ConfigError: if a file cannot be read as an image.
        """
        frame = framing or self._centre
        return torch.stack([frame(self._decoded(row)) for row in rows.tolist()]).float() / 255

    def _decoded(self, row: int) -> Tensor:
        path = os.fsdecode(self._paths[row])
        try:
            decoded: Tensor = v2.functional.pil_to_tensor(default_loader(path))
        except OSError as error:
            raise ConfigError(f"data: {path} cannot be read as an image ({error}); mend or remove it") from error
        return decoded


@dataclass(frozen=True)
class Part:
    """Some of the images of a source, with their labels, normalized; parts share the stored images.

    Attributes:
        pixels: the stored images.
        labels: (N,) of int64, on the CPU.
        rows: (N,), where in ``pixels`` they are.
        mean, deviation: (C,), taken out of each channel's values in [0, 1] when images are read.
        workers: processes that read batches; with 0, the main process reads them.
    """

    pixels: Pixels
    labels: Tensor
    rows: Tensor
    mean: Tensor
    deviation: Tensor
    workers: int = 0

    @staticmethod
    def of(pixels: Pixels, labels: Tensor, workers: int = 0) -> Part:
        """All of ``pixels``, not normalized yet."""
        channels = pixels.image_channels
        rows = torch.arange(len(labels))
        return Part(pixels, labels.long(), rows, torch.zeros(channels), torch.ones(channels), workers)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: Tensor | np.ndarray) -> Part:
        """Those in these positions, in this order."""
        positions = torch.as_tensor(positions)
        return replace(self, labels=self.labels[positions], rows=self.rows[positions])

    def normalized(self, mean: Tensor, deviation: Tensor) -> Part:
        """With this mean and deviation, (C,) each and of values in [0, 1], taken out of the stored images."""
        return replace(self, mean=mean, deviation=deviation)

    def statistics(self, at_most: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean and deviation, (C,) each, of the stored values in [0, 1]; ``at_most``: of so many images, evenly apart.

        A deviation is at least 1e-6, so that a constant channel can be divided by it.
        """
        count = len(self) if at_most is None else min(at_most, len(self))
        chosen = self.take(torch.linspace(0, len(self) - 1, count).round().long())
        raw = chosen.normalized(torch.zeros_like(self.mean), torch.ones_like(self.deviation))
        sums = torch.zeros(2, self.pixels.image_channels, dtype=torch.float64)
        values = 0
        for images, _ in raw.in_order(500):
            sums += torch.stack([images.double().sum((0, 2, 3)), images.double().square().sum((0, 2, 3))]).cpu()
            values += images[:, 0].numel()
        mean, square = sums / values
        return mean.float(), (square - mean.square()).clamp(min=0).sqrt().clamp(min=1e-6).float()

    def batches(self, size: int, augmentation: Augmentation | None = None) -> DataLoader[Images]:
        """Batches of :class:`Images` in a new random order each pass, for training.

        A last batch of fewer images is left out; where there are fewer than ``size``, all are one batch. A pass draws
        one number from torch's global CPU generator, and its order and every augmentation follow from that alone: a
        stream that resumes gives the same bits, whatever the number of workers.

        Of several processes that train together, each reads its share of every batch alone, and augments it by draws
        of its own.

        Raises:
            ConfigError: if the augmentation does not fit the images, or a batch cannot be shared out evenly.
        """
        transforms = make_transforms(augmentation or Augmentation(), self.pixels.image_channels, self.pixels.shape)
        whole = min(size, len(self))
        sampler = _Shuffled(len(self), whole, distributed.share(whole, "batch_size: a batch"))
        return DataLoader(_Batched(self, transforms), sampler=sampler, batch_size=None, num_workers=self.workers)

    def in_order(self, size: int) -> DataLoader[Images]:
        """Batches of :class:`Images`, each image once and as it is, the last batch possibly smaller; for testing."""
        sampler = _InOrder(len(self), size)
        return DataLoader(_Batched(self, None), sampler=sampler, batch_size=None, num_workers=self.workers)

    def load(self) -> Images:
        """All of them at once; only for parts that fit in memory."""
        return Images(*(torch.cat(parts) for parts in zip(*self.in_order(500), strict=True)))


class _Batched(Dataset[Images]):
    """A part whose items are whole batches, so that they can be cut and augmented at once."""

    def __init__(self, part: Part, transforms: Transforms | None) -> None:
        self._part = part
        self._transforms = transforms

    def __getitem__(self, key: Key) -> Images:
        positions, seed = key
        part, device = self._part, self._part.pixels.device
        labels = part.labels[positions].to(device)
        if self._transforms is None:
            return Images(self._normalized(part.pixels.read(part.rows[positions])), labels)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            framed = part.pixels.read(part.rows[positions], self._transforms.framing)
            normalized = self._normalized(self._transforms.pixels(framed))
            return Images(self._transforms.normalized(normalized), labels)

    def _normalized(self, images: Tensor) -> Tensor:
        mean, deviation = (value.to(images.device).view(-1, 1, 1) for value in (self._part.mean, self._part.deviation))
        return (images - mean) / deviation


class _Shuffled(Sampler[Key]):
    """Shares of whole batches in random order, and a seed for each, all from one draw of the global generator."""

    def __init__(self, count: int, size: int, share: slice) -> None:
        self._count = count
        self._size = size
        self._share = share

    def __len__(self) -> int:
        return self._count // self._size

    def __iter__(self) -> Iterator[Key]:
        generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        order = torch.randperm(self._count, generator=generator)
        for positions in order[: len(self) * self._size].split(self._size):
            seed = int(torch.randint(2**62, (), generator=generator))
            yield positions[self._share], seed + self._share.start


class _InOrder(Sampler[Key]):
    """Positions of batches in order; nothing is drawn, so the seed is no matter."""

    def __init__(self, count: int, size: int) -> None:
        self._count = count
        self._size = size

    def __len__(self) -> int:
        return math.ceil(self._count / self._size)

    def __iter__(self) -> Iterator[Key]:
        for positions in torch.arange(self._count).split(self._size):
            yield positions, 0
