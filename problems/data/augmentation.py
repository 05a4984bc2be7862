"""Random changes of training images: drawn on the host, made on the images' device.

The random values of a batch come from torch's global CPU generator, so that they are the same on every device. Those of
crop, flip and cutout go to the device in one copy, and there each operation changes the whole batch at once. Jitter is
torchvision's, image by image, and so is the resized crop, which :meth:`problems.data.images.Pixels.read` makes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from mlo import ConfigError
from mlo.levels.transfers import to_device
from problems.data.options import Augmentation


class Draws(NamedTuple):
    """The random values of a batch of B images.

    Attributes:
        places: (3, B) of int64, on the images' device: where the window of each image begins, as an index into the
            flattened batch of padded images, followed by their mirror images; row and column of the center of the
            cutout.
        colors: torchvision's parameters of the jitter, for each image; empty without jitter.
    """

    places: Tensor
    colors: list[dict[str, Any]]


class Transforms:
    """The random changes of an :class:`Augmentation`.

    Args:
        augmentation: the options.
        image_channels, shape: C and (H, W) of the images.
        device: of the images.

    Attributes:
        framing: crops one image of any size to ``shape``; None: the default of the source.

    Raises:
        ConfigError: if there is jitter and the images do not have 1 or 3 channels, or if crop or cutout is larger than
            the images.
    """

    def __init__(
        self, augmentation: Augmentation, image_channels: int, shape: tuple[int, int], device: torch.device
    ) -> None:
        _check(augmentation, image_channels, shape)
        strength = 0.4 * augmentation.jitter
        self.framing = v2.RandomResizedCrop(shape, antialias=True) if augmentation.resized_crop else None
        self._augmentation = augmentation
        self._shape, self._device = shape, device
        self._padded = (image_channels, *(size + 2 * augmentation.crop for size in shape))
        self._colors = v2.ColorJitter(strength, strength, strength, strength / 2)
        sizes = shape if augmentation.cutout else ()
        self._squares = [to_device(_squares(size, augmentation.cutout), device) for size in sizes]

    def draw(self, count: int) -> Draws:
        """The random values of ``count`` images, from torch's global CPU generator."""
        options, places = self._augmentation, torch.zeros(3, count, dtype=torch.int64)
        offsets, mirrored = torch.zeros(count, 2, dtype=torch.int64), torch.zeros(count, dtype=torch.bool)
        if options.crop:
            offsets = torch.randint(2 * options.crop + 1, (count, 2))
        if options.flip:
            mirrored = torch.rand(count) < 0.5
        colors = [self._colors.make_params([]) for _ in range(count if options.jitter else 0)]
        if options.cutout:
            places[1], places[2] = (torch.randint(size, (count,)) for size in self._shape)
        channels, height, width = self._padded
        lefts = torch.where(mirrored, 2 * options.crop - offsets[:, 1], offsets[:, 1])
        images = torch.arange(count) + count * mirrored
        places[0] = (images * channels * height + offsets[:, 0]) * width + lefts
        return Draws(to_device(places, self._device), colors)

    def move(self, images: Tensor, draws: Draws) -> Tensor:
        """Crop and flip images (B, C, H, W) of any type.

        Half of them are mirrored left to right. Each is a window of the image that is padded with zeros; all positions
        of the window are equally probable.
        """
        options = self._augmentation
        if not options.crop and not options.flip:
            return images
        padded = F.pad(images, (options.crop,) * 4)
        both = torch.cat([padded, padded.flip(-1)]).contiguous()
        window = (self._padded[0], *self._shape)
        last = sum((size - 1) * stride for size, stride in zip(window, both.stride()[1:], strict=True))
        windows = both.as_strided((both.numel() - last, *window), (1, *both.stride()[1:]))  # from each element on
        return windows.index_select(0, draws.places[0])

    def recolor(self, images: Tensor, draws: Draws) -> Tensor:
        """Jitter images (B, C, H, W) with values in [0, 1]."""
        if not self._augmentation.jitter:
            return images
        return torch.stack([self._colors.transform(*each) for each in zip(images, draws.colors, strict=True)])

    def erase(self, images: Tensor, draws: Draws) -> Tensor:
        """Set a square to zero in each of the normalized images (B, C, H, W), in place.

        Its center is uniform over the image, so the square may extend beyond the edge (DeVries & Taylor 2017,
        arXiv:1708.04552).
        """
        if not self._augmentation.cutout:
            return images
        rows, columns = (inside[centers] for inside, centers in zip(self._squares, draws.places[1:], strict=True))
        return images.masked_fill_((rows[:, :, None] & columns[:, None, :]).unsqueeze(1), 0.0)


def _squares(size: int, length: int) -> Tensor:
    """Which positions along an axis are inside a square with side ``length``, for each center: (size, size)."""
    positions = torch.arange(size)
    first = positions[:, None] - length // 2
    return (positions >= first) & (positions < first + length)


def _check(augmentation: Augmentation, image_channels: int, shape: tuple[int, int]) -> None:
    if augmentation.jitter and image_channels not in (1, 3):
        raise ConfigError(
            f"augmentation.jitter: {augmentation.jitter} was given, but the images have {image_channels} channels, and "
            "jitter needs color or gray images; write jitter: 0"
        )
    for option, value in (("crop", augmentation.crop), ("cutout", augmentation.cutout)):
        if value > min(shape):
            raise ConfigError(
                f"augmentation.{option}: {value} was given, but the images are {shape[0]}x{shape[1]} pixels; "
                f"write at most {min(shape)}"
            )
