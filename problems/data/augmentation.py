"""Random changes of training images.

Random values are drawn for each image, from torch's global CPU generator. Images are changed on their device. A
torchvision transform draws once for a whole batch. So crop, flip and cutout are our own: they draw for each image and
change the whole batch at once. On one CPU core, crop and flip of 64 images of 3x32x32 take 0.9 ms, and 1.8 ms with
torchvision's transforms, image by image. Resized crop and jitter are torchvision's, image by image (3 and 13 ms).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from mlo import ConfigError
from problems.data.options import Augmentation


class Transforms(NamedTuple):
    """The transforms of an :class:`Augmentation` for images of one shape, in the order of use.

    Attributes:
        framing: crops one image of any size to the shape; None: the default of the source.
        pixels: for a batch (B, C, H, W) with values in [0, 1].
        normalized: for the batch after normalization.
    """

    framing: v2.Transform | None
    pixels: v2.Transform
    normalized: v2.Transform


def make_transforms(augmentation: Augmentation, image_channels: int, shape: tuple[int, int]) -> Transforms:
    """The transforms for images with ``image_channels`` channels and ``shape`` (H, W).

    Raises:
        ConfigError: if there is jitter and the images do not have 1 or 3 channels, or if crop or cutout is larger than
            the images.
    """
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
    strength = augmentation.jitter
    colors = v2.ColorJitter(0.4 * strength, 0.4 * strength, 0.4 * strength, 0.2 * strength)
    pixels = [
        *([CropEach(augmentation.crop)] if augmentation.crop else []),
        *([FlipEach()] if augmentation.flip else []),
        *([Each(colors)] if strength else []),
    ]
    return Transforms(
        framing=v2.RandomResizedCrop(shape, antialias=True) if augmentation.resized_crop else None,
        pixels=v2.Compose(pixels or [v2.Identity()]),
        normalized=CutoutEach(augmentation.cutout) if augmentation.cutout else v2.Identity(),
    )


class CropEach(v2.Transform):  # type: ignore[misc]
    """Pads each image of (B, C, H, W) with ``padding`` zeros on each side, and crops it at random to its old size."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The offsets in the padded images, (B, 2)."""
        return {"offsets": torch.randint(2 * self.padding + 1, (len(flat_inputs[0]), 2))}

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        """The cropped images, (B, C, H, W)."""
        count, channels, height, width = inpt.shape
        device = inpt.device
        tops, lefts = params["offsets"].to(device).T
        rows = (tops[:, None] + torch.arange(height, device=device)).view(count, 1, height, 1)
        columns = (lefts[:, None] + torch.arange(width, device=device)).view(count, 1, 1, width)
        images = torch.arange(count, device=device).view(-1, 1, 1, 1)
        return F.pad(inpt, (self.padding,) * 4)[
            images, torch.arange(channels, device=device).view(-1, 1, 1), rows, columns
        ]


class FlipEach(v2.Transform):  # type: ignore[misc]
    """Mirrors each image of (B, C, H, W) left to right with probability 0.5."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Which images to flip, (B,)."""
        return {"flipped": torch.rand(len(flat_inputs[0])) < 0.5}

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        """The images (B, C, H, W), some of them mirrored."""
        return torch.where(params["flipped"].to(inpt.device).view(-1, 1, 1, 1), inpt.flip(-1), inpt)


class CutoutEach(v2.Transform):  # type: ignore[misc]
    """Sets a square with side ``length`` to zero in each image of (B, C, H, W).

    Its center is uniform over the image, so the square may extend beyond the edge (DeVries & Taylor 2017,
    arXiv:1708.04552).
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The centers, (B, 2): row and column."""
        count, _, height, width = flat_inputs[0].shape
        return {"centers": torch.stack([torch.randint(height, (count,)), torch.randint(width, (count,))], dim=1)}

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        """The images with their squares, (B, C, H, W)."""
        centers = params["centers"].to(inpt.device)
        rows, columns = (self._inside(centers[:, axis], inpt.shape[2 + axis]) for axis in (0, 1))
        return inpt.masked_fill((rows[:, :, None] & columns[:, None, :]).unsqueeze(1), 0.0)

    def _inside(self, centers: Tensor, size: int) -> Tensor:
        """Which of the ``size`` positions along an axis are inside each image's square, (B, size)."""
        first = centers[:, None] - self.length // 2
        positions = torch.arange(size, device=centers.device)
        return (positions >= first) & (positions < first + self.length)


class Each(v2.Transform):  # type: ignore[misc]
    """Applies a transform of one image to each image of (B, C, H, W), with separate random draws."""

    def __init__(self, one: v2.Transform) -> None:
        super().__init__()
        self.one = one

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        """The images (B, C, H, W), each transformed."""
        return torch.stack([self.one(image) for image in inpt])
