"""The options of the data: which images, how they are split, how training images are augmented. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from mlo import Config
from problems.data.locations import data_root, read_from

if TYPE_CHECKING:
    import torch

    from problems.data.splits import Splits


class Augmentation(Config):
    """How training images are changed at random.

    DARTS on CIFAR: crop 4 and flip, and in the final training cutout 16 too.
    """

    crop: int = Field(0, ge=0, description="pixels of black border from which an image of the old size is cut; 0: none")
    flip: bool = Field(False, description="mirror left and right, half of the images")
    cutout: int = Field(0, ge=0, description="side of a square that is set to the mean (DeVries & Taylor, 2017)")
    resized_crop: bool = Field(
        False, description="cut 8 to 100 % of the area at an aspect of 3/4 to 4/3, as is usual for ImageNet"
    )
    jitter: float = Field(
        0.0,
        ge=0,
        le=2.5,
        description="change of colours; 1: brightness, contrast, saturation 0.4, hue 0.2, as DARTS on ImageNet",
    )

    @model_validator(mode="after")
    def _one_crop(self) -> Augmentation:
        if self.crop and self.resized_crop:
            raise ValueError(
                f"crop: {self.crop} and resized_crop: true both cut the image; leave one out "
                "(CIFAR is usually trained with crop: 4, ImageNet with resized_crop: true)"
            )
        return self


class Data(Config):
    """Which images, and how many of them for what; sizes are drawn at random, each class in its share."""

    source: str = Field(
        "digits",
        description="digits (scikit-learn's) | cifar10 | cifar100 | fashion_mnist | imagenet | the path of an .npz "
        "file of images and labels | the path of a folder with train/ and test/ (or val/), one folder of files a class",
    )
    root: str | None = Field(None, description="folder where data sets lie; null: $MLO_DATA, or ~/.cache/mlo/data")
    download: bool = Field(False, description="let torchvision download cifar10, cifar100 or fashion_mnist into root")
    unlabeled_source: str | None = Field(
        None, description="another source, for the unlabeled images; null: they are taken from source"
    )
    train_size: int | None = Field(
        200, ge=1, description="labeled images that the networks learn from; null: those left over"
    )
    validation_size: int | None = Field(
        200, ge=1, description="labeled images that the architecture is judged by; null: those left over"
    )
    unlabeled_size: int | None = Field(
        800, ge=1, description="images whose labels are hidden; null: those left over, or all of unlabeled_source"
    )
    held_out_size: int | None = Field(
        None, ge=1, description="labeled images that are the test instead of the source's own; null: its own"
    )
    test_size: int | None = Field(None, ge=1, description="test images to use; null: all of them")
    image_size: int | None = Field(
        None, ge=1, description="side in pixels to which images are resized; null: as they are, files to 224"
    )
    workers: int = Field(0, ge=0, description="processes that read batches of image files; 0: no other process")

    @model_validator(mode="after")
    def _other_source(self) -> Data:
        root, other = data_root(self.root), self.unlabeled_source
        if other is not None and read_from(other, root) == read_from(self.source, root):
            raise ValueError(
                f"unlabeled_source: {other} is the source itself, whose images would be labeled and unlabeled at "
                "once; leave it out, and unlabeled images are drawn apart from the labeled ones"
            )
        return self

    def splits(self, seed: int, device: torch.device | None = None) -> Splits:
        """Load the images and split them; see :func:`problems.data.splits.load_splits`."""
        from problems.data.splits import load_splits

        return load_splits(self, seed, device)
