"""Random changes of training images.

Everything is drawn separately for each image, from torch's global CPU generator, and computed on the images' device. A
torchvision transform draws once for a whole batch, so crop, flip and cutout are transforms of our own that draw values
for every image and change the batch at once: on one CPU core, crop and flip of 64 images of 3x32x32 take 0.9 ms, and
1.8 ms with torchvision's transforms, image by image. Resized crop and jitter are torchvision's, image by image (3 and
13 ms).
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
    """What an :class:`Augmentation` does to images of one shape, in this order.

    Attributes:
        framing: cuts one image, (C, any, any), to its shape; None: the source's own way.
        pixels: of a batch (B, C, H, W) in [0, 1].
        normalized: of the batch once it is normalized.
    """

    framing: v2.Transform | None
    pixels: v2.Transform
    normalized: v2.Transform


def make_transforms(augmentation: Augmentation, image_channels: int, shape: tuple[int, int]) -> Transforms:
    """The transforms of images of ``image_channels`` channels and ``shape`` (H, W).

    Raises:
        ConfigError: if there is jitter and the images do not have 1 or 3 channels, or if the border or the cutout is
            larger than the images.
    """
    if augmentation.jitter and image_channels not in (1, 3):
        raise ConfigError(
            f"augmentation.jitter: {augmentation.jitter} was given, but the images have {image_channels} channels, and "
            "only colour and grey images have brightness and hue; write jitter: 0"
        )
    for option, value in (("crop", augmentation.crop), ("cutout", augmentation.cutout)):
        if value > min(shape):
            raise ConfigError(
                f"augmentation.{option}: {value} was given, but the images are {shape[0]}x{shape[1]} pixels; "
                f"write at most {min(shape)}"
            )
    strength = augmentation.jitter
    colours = v2.ColorJitter(0.4 * strength, 0.4 * strength, 0.4 * strength, 0.2 * strength)
    pixels = [
        *([CropEach(augmentation.crop)] if augmentation.crop else []),
        *([FlipEach()] if augmentation.flip else []),
        *([Each(colours)] if strength else []),
    ]
    return Transforms(
        framing=v2.RandomResizedCrop(shape, antialias=True) if augmentation.resized_crop else None,
        pixels=v2.Compose(pixels or [v2.Identity()]),
        normalized=CutoutEach(augmentation.cutout) if augmentation.cutout else v2.Identity(),
    )


class CropEach(v2.Transform):  # type: ignore[misc]
    """RandomCrop at the images' own size, with a border of ``padding`` zeros, of each image of (B, C, H, W)."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The offsets in the padded images, (B, 2)."""
        return {"offsets": torch.randint(2 * self.padding + 1, (len(flat_inputs[0]), 2))}

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        """The images (B, C, H, W), cut."""
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
    """RandomHorizontalFlip of each image of (B, C, H, W)."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Which to flip, (B,)."""
        return {"flipped": torch.rand(len(flat_inputs[0])) < 0.5}

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        """The images (B, C, H, W), some of them mirrored."""
        return torch.where(params["flipped"].to(inpt.device).view(-1, 1, 1, 1), inpt.flip(-1), inpt)


class CutoutEach(v2.Transform):  # type: ignore[misc]
    """A square of side ``length`` set to zero in each image of (B, C, H, W).

    Its centre is uniform over the image, so it may hang over the edge (DeVries & Taylor, 2017, arXiv:1708.04552).
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The centres, (B, 2): row and column."""
        count, _, height, width = flat_inputs[0].shape
        return {"centres": torch.stack([torch.randint(height, (count,)), torch.randint(width, (count,))], dim=1)}

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        """The images (B, C, H, W) with their holes."""
        centres = params["centres"].to(inpt.device)
        rows, columns = (self._inside(centres[:, axis], inpt.shape[2 + axis]) for axis in (0, 1))
        return inpt.masked_fill((rows[:, :, None] & columns[:, None, :]).unsqueeze(1), 0.0)

    def _inside(self, centres: Tensor, size: int) -> Tensor:
        """Which of ``size`` positions along an axis are in each square, (B, size)."""
        first = centres[:, None] - self.length // 2
        positions = torch.arange(size, device=centres.device)
        return (positions >= first) & (positions < first + self.length)


class Each(v2.Transform):  # type: ignore[misc]
    """Applies a transform of one image to each image of (B, C, H, W), with separate random draws."""

    def __init__(self, one: v2.Transform) -> None:
        super().__init__()
        self.one = one

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        """The images (B, C, H, W), each transformed."""
        return torch.stack([self.one(image) for image in inpt])
