"""The options of the evaluation phase: an architecture's network and its training. Does not import torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mlo import Config
from problems.data.options import Augmentation
from problems.search.options import Precision


class Training(Config):
    """How an architecture's network is built and trained."""

    channels: int = Field(
        8, ge=1, description="channels of the first cell; in papers, 36 for CIFAR and 48 for ImageNet"
    )
    cells: int = Field(3, ge=1, description="cells of the network; in papers, 20 for CIFAR and 14 for ImageNet")
    batch_size: int = Field(50, ge=2, description="images in a training batch")
    learning_rate: float = Field(0.05, gt=0, description="learning rate of SGD with momentum 0.9")
    schedule: Literal["cosine", "exponential", "linear"] = Field(
        "cosine",
        description="of the learning rate; cosine: down to 0; exponential: times 0.97 after each epoch; linear: up for "
        "5 epochs, then down to 0",
    )
    weight_decay: float = Field(3e-4, ge=0, description="weight decay of SGD")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing (0.1 for ImageNet)")
    drop_path: float = Field(0.0, ge=0, lt=1, description="probability of dropping a path at the end; it grows from 0")
    auxiliary: bool = Field(False, description="train with an auxiliary head; needs images of 32x32 or larger")
    augmentation: Augmentation = Field(Augmentation(), description="augmentation of the training images")
    precision: Precision = Field("float32", description="autocast type of the loss; the test is in float32")
    tf32: bool | None = Field(
        None,
        description="whether float32 training may use TensorFloat-32 on a GPU; null: as torch is set, which is yes for "
        "convolutions",
    )
    images: Literal["labeled", "everything"] = Field(
        "labeled",
        description="which images to train on; labeled: those that a search trains and validates on; everything: "
        "all labeled images but the test images",
    )


class FinalTraining(Training):
    """The final training of the architectures that a search found."""

    steps: int = Field(300, ge=1, description="steps of the final training")
