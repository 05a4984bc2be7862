"""The options of the evaluation phase: the network of an architecture and its training. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mlo import Config
from problems.data.options import Augmentation
from problems.search.options import Precision


class Training(Config):
    """How the network of an architecture is built and trained."""

    channels: int = Field(8, ge=1, description="channels of the first cell (36 for CIFAR, 48 for ImageNet, in papers)")
    cells: int = Field(3, ge=1, description="cells (20 for CIFAR, 14 for ImageNet)")
    batch_size: int = Field(50, ge=2, description="images in a batch")
    learning_rate: float = Field(0.05, gt=0, description="of SGD with momentum 0.9")
    schedule: Literal["cosine", "exponential", "linear"] = Field(
        "cosine",
        description="of the learning rate: cosine to 0; exponential, x0.97 an epoch; linear to 0 after 5 epochs",
    )
    weight_decay: float = Field(3e-4, ge=0, description="of SGD")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="0.1 for ImageNet")
    drop_path: float = Field(0.0, ge=0, lt=1, description="last probability of dropping a path, growing from 0")
    auxiliary: bool = Field(False, description="train with an auxiliary head (for images of 32x32 and up)")
    augmentation: Augmentation = Field(Augmentation(), description="of the training images")
    precision: Precision = Field("float32", description="of the loss, under autocast; the test is in float32")
    images: Literal["labeled", "everything"] = Field(
        "labeled", description="train on the search's train and validation images, or on all that have labels"
    )


class FinalTraining(Training):
    """The networks that the found architectures stand for, trained on train and validation images together."""

    steps: int = Field(300, ge=1, description="training steps")
