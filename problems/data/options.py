"""The options of the data: which images, how they are split, and how they are augmented. Does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from mlo import Config
from problems.data.locations import data_root, read_from

if TYPE_CHECKING:
    import torch

    from problems.data.splits import Splits


class Augmentation(Config):
    """Random changes of training images.

    On CIFAR, DARTS uses crop 4 and flip, and in the final training cutout 16 too.
    """

    crop: int = Field(0, ge=0, description="pad by this many black pixels, then crop to the old size; 0: no crop")
    flip: bool = Field(False, description="mirror half of the images left to right")
    cutout: int = Field(0, ge=0, description="side of a square set to the mean (DeVries & Taylor 2017); 0: none")
    resized_crop: bool = Field(
        False,
        description="crop 8 to 100 % of the area, at an aspect ratio of 3/4 to 4/3, and resize; usual for ImageNet",
    )
    jitter: float = Field(
        0.0,
        ge=0,
        le=2.5,
        description="strength of random color changes; 1, usual for ImageNet: brightness, contrast and saturation by "
        "0.4, hue by 0.2",
    )

    @model_validator(mode="after")
    def _one_crop(self) -> Augmentation:
        if self.crop and self.resized_crop:
            raise ValueError(
                f"crop: {self.crop} and resized_crop: true both crop the image; set one of them "
                "(usually crop: 4 for CIFAR, and resized_crop: true for ImageNet)"
            )
        return self


class Data(Config):
    """Which images, and how they are split: at random, with the proportions of the classes."""

    source: str = Field(
        "digits",
        description="digits, cifar10, cifar100, fashion_mnist, imagenet or a path; of an .npz file, or of a folder "
        "with train/ and test/ (or val/), each with one subfolder for each class",
    )
    root: str | None = Field(None, description="folder that holds data sets; null: $MLO_DATA, or ~/.cache/mlo/data")
    download: bool = Field(False, description="download cifar10, cifar100 or fashion_mnist if missing")
    unlabeled_source: str | None = Field(None, description="source of the unlabeled images; null: the same as source")
    train_size: int | None = Field(
        200, ge=1, description="number of labeled images to train on; null: all that are left over"
    )
    validation_size: int | None = Field(
        200, ge=1, description="number of labeled images for validation; null: all that are left over"
    )
    unlabeled_size: int | None = Field(
        800, ge=1, description="number of unlabeled images; null: all that are left over, or all of unlabeled_source"
    )
    held_out_size: int | None = Field(
        None, ge=1, description="test on this many labeled images; null: on the source's own test images"
    )
    test_size: int | None = Field(None, ge=1, description="number of test images to use; null: all")
    image_size: int | None = Field(
        None, ge=1, description="resize images to this side, in pixels; null: do not resize (image files: 224)"
    )
    workers: int = Field(0, ge=0, description="processes that load image files; 0: the main process loads them")

    @model_validator(mode="after")
    def _other_source(self) -> Data:
        root, other = data_root(self.root), self.unlabeled_source
        if other is not None and read_from(other, root) == read_from(self.source, root):
            raise ValueError(
                f"unlabeled_source: {other} is the same as source, so the same images would be used with and without "
                "labels; leave it out to draw other images of source as the unlabeled ones"
            )
        return self

    def splits(self, seed: int, device: torch.device | None = None) -> Splits:
        """Load the images and split them; see :func:`problems.data.splits.load_splits`."""
        from problems.data.splits import load_splits

        return load_splits(self, seed, device)
