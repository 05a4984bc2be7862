"""Labeled images in memory or in files, behind one interface, and batches of them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from PIL.Image import DecompressionBombError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from mlo import ConfigError, distributed
from mlo.levels.transfers import to_device
from problems.data.augmentation import Transforms
from problems.data.options import Augmentation

RESIZED = 256 / 224  # images in files are resized to this multiple of the side, and then cropped at the center
Key: TypeAlias = tuple[Tensor, Tensor, int]  # rows and labels of a batch's images, and a seed for its augmentation


class Images(NamedTuple):
    """A batch: images, (B, C, H, W) of normalized float32, and labels, (B,) of int64."""

    images: Tensor
    labels: Tensor


class Pixels(Protocol):
    """Stored images: of uint8, or of float in [0, 1]."""

    @property
    def image_channels(self) -> int:
        """C, the number of channels that :meth:`read` returns."""

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W) of the images that :meth:`read` returns."""

    @property
    def device(self) -> torch.device:
        """The device of the images that :meth:`read` returns."""

    def read(self, rows: Tensor, framing: v2.Transform | None = None) -> Tensor:
        """The images in these rows, (B, C, H, W); ``framing`` crops each image of any size to (C, H, W).

        ``rows`` are on :attr:`device`.
        """


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
        """Read and crop on the array's device."""
        images = self.array.index_select(0, rows)
        return images if framing is None else torch.stack([framing(image) for image in to_unit(images)])


class FilePixels:
    """Images in files, decoded to three channels on the CPU when they are read.

    Without ``framing``, the shorter side is resized to 256/224 of ``image_size``, and the center is cropped.
    """

    def __init__(self, paths: Sequence[str], image_size: int) -> None:
        self._paths = np.array(
            [os.fsencode(path) for path in paths]
        )  # bytes: shared by loader processes without a copy
        self._size = image_size
        self._center = v2.Compose([v2.Resize(round(RESIZED * image_size)), v2.CenterCrop(image_size)])

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
        """Decode and crop.

        Raises:
            ConfigError: if a file cannot be read as an image.
        """
        frame = framing or self._center
        return torch.stack([frame(self._decoded(row)) for row in rows.tolist()])

    def _decoded(self, row: int) -> Tensor:
        path = os.fsdecode(self._paths[row])
        try:
            decoded: Tensor = v2.functional.pil_to_tensor(default_loader(path))
        except (OSError, ValueError, SyntaxError, EOFError, DecompressionBombError) as error:
            raise ConfigError(f"data: {path} cannot be read as an image ({error}); repair or remove it") from error
        return decoded


def to_unit(images: Tensor) -> Tensor:
    """Images of uint8 as float32 in [0, 1]; those of float as they are."""
    if images.is_floating_point():
        return images
    return images.float().div_(torch.full((), 255.0, device=images.device))  # a GPU multiplies by 1/255.0, rounded


@dataclass(frozen=True)
class Part:
    """Some of a source's images, normalized, with their labels. Parts share the stored images.

    Attributes:
        pixels: the stored images.
        labels: (N,) of int64, on the CPU.
        rows: (N,), the rows of these images in ``pixels``.
        mean, deviation: (C,), used to normalize each channel's values in [0, 1] when images are read.
        workers: processes that load batches; with 0, the main process loads them.
        pin_memory: whether batches are loaded into pinned memory, from where they are copied to a GPU.
    """

    pixels: Pixels
    labels: Tensor
    rows: Tensor
    mean: Tensor
    deviation: Tensor
    workers: int = 0
    pin_memory: bool = False

    @staticmethod
    def of(pixels: Pixels, labels: Tensor, workers: int = 0, pin_memory: bool = False) -> Part:
        """All of ``pixels``, not normalized yet."""
        mean, deviation = torch.zeros(pixels.image_channels), torch.ones(pixels.image_channels)
        return Part(pixels, labels.long(), torch.arange(len(labels)), mean, deviation, workers, pin_memory)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: Tensor | np.ndarray) -> Part:
        """The images at these positions, in this order."""
        positions = torch.as_tensor(positions)
        return replace(self, labels=self.labels[positions], rows=self.rows[positions])

    def normalized(self, mean: Tensor, deviation: Tensor) -> Part:
        """The same part, normalized by this mean and deviation, (C,) each, of values in [0, 1]."""
        return replace(self, mean=mean, deviation=deviation)

    def statistics(self, at_most: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean and deviation, (C,) each, of the stored values in [0, 1]; of ``at_most`` images, evenly spaced.

        Deviations are at least 1e-6, so that a constant channel does not cause a division by zero.
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
        """Batches of :class:`Images` for training, in a new random order in each pass.

        An incomplete last batch is left out. If there are fewer than ``size`` images, all of them are one batch. Each
        pass draws one number from torch's global CPU generator. Its order and all augmentations follow from this
        number, so a resumed run sees the same images bit for bit, with any number of workers.

        If several processes train together, each one reads and augments only its own share of every batch.

        Raises:
            ConfigError: if the augmentation does not fit the images, or a batch cannot be shared out evenly.
        """
        pixels, transforms = self.pixels, None
        if augmentation not in (None, Augmentation()):
            transforms = Transforms(augmentation, pixels.image_channels, pixels.shape, pixels.device)
        whole = min(size, len(self))
        return self._loader(transforms, _Shuffled(self, whole, distributed.share(whole, "batch_size: a batch")))

    def in_order(self, size: int) -> DataLoader[Images]:
        """Batches of :class:`Images` for testing: each image once, in order, without augmentation."""
        return self._loader(None, _InOrder(self, size))

    def load(self) -> Images:
        """All images at once; only for parts that fit into memory."""
        return Images(*(torch.cat(parts) for parts in zip(*self.in_order(500), strict=True)))

    def ordered(self, positions: Tensor) -> Tensor:
        """Rows and labels of the images at these positions, (2, B), on the device of the pixels."""
        return to_device(torch.stack([self.rows[positions], self.labels[positions]]), self.pixels.device)

    def _loader(self, transforms: Transforms | None, sampler: Sampler[Key]) -> DataLoader[Images]:
        options: dict[str, Any] = {"num_workers": self.workers, "pin_memory": self.pin_memory}
        return DataLoader(_Batched(self, transforms), sampler=sampler, batch_size=None, **options)


class _Batched(Dataset[Images]):
    """A part whose items are whole batches, made on the device of the pixels. Nothing is read back from there."""

    def __init__(self, part: Part, transforms: Transforms | None) -> None:
        self._pixels = part.pixels
        self._transforms = transforms
        self._moments = to_device(torch.stack([part.mean, part.deviation]), part.pixels.device).view(2, -1, 1, 1)

    def __getitem__(self, key: Key) -> Images:
        (rows, labels, seed), transforms = key, self._transforms
        if transforms is None:
            return Images(self._normalized(to_unit(self._pixels.read(rows))), labels)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            images = self._pixels.read(rows, transforms.framing)
            draws = transforms.draw(len(rows))
        images = transforms.recolor(to_unit(transforms.move(images, draws)), draws)
        return Images(transforms.erase(self._normalized(images), draws), labels)

    def _normalized(self, images: Tensor) -> Tensor:
        return (images - self._moments[0]).div_(self._moments[1])


class _Shuffled(Sampler[Key]):
    """This process's share of each batch, in random order, with a seed; all from one draw of the global generator."""

    def __init__(self, part: Part, size: int, share: slice) -> None:
        self._part = part
        self._size = size
        self._share = share

    def __len__(self) -> int:
        return len(self._part) // self._size

    def __iter__(self) -> Iterator[Key]:
        generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        order = torch.randperm(len(self._part), generator=generator)[: len(self) * self._size]
        for batch in self._part.ordered(order).split(self._size, dim=1):
            rows, labels = batch[:, self._share]
            seed = int(torch.randint(2**62, (), generator=generator))
            yield rows, labels, seed + self._share.start


class _InOrder(Sampler[Key]):
    """Batches in order. Nothing is drawn, so the seed is not used."""

    def __init__(self, part: Part, size: int) -> None:
        self._part = part
        self._size = size

    def __len__(self) -> int:
        return math.ceil(len(self._part) / self._size)

    def __iter__(self) -> Iterator[Key]:
        for rows, labels in self._part.ordered(torch.arange(len(self._part))).split(self._size, dim=1):
            yield rows, labels, 0
