"""Image data: loading, splitting, batching, and small students to be taught on it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from mlo import ConfigError


class Images(NamedTuple):
    """Labeled images: (N, C, H, W) of float32 and (N,) of int64."""

    images: Tensor
    labels: Tensor

    def take(self, indices: np.ndarray) -> Images:
        """Those with these indices."""
        return Images(self.images[indices], self.labels[indices])

    def normalized(self, like: Images) -> Images:
        """With the mean and deviation of each channel of ``like`` taken out."""
        mean = like.images.mean(dim=(0, 2, 3), keepdim=True)
        deviation = like.images.std(dim=(0, 2, 3), keepdim=True).clamp(min=1e-6)
        return Images((self.images - mean) / deviation, self.labels)


class Splits(NamedTuple):
    """Disjoint parts of a data set, normalized by the first."""

    train: Images
    validation: Images
    unlabeled: Images
    test: Images


def load_images(source: str) -> tuple[Images, Images | None]:
    """All images of a source, and its test images if it says which those are; values in [0, 1].

    Args:
        source: "digits" (scikit-learn's 1,797 of 8x8), or the path of an .npz file with train_images (N, H, W, C) of
            uint8, train_labels, test_images and test_labels.

    Raises:
        ConfigError: if there is no such source, or the file lacks an array.
    """
    if source == "digits":
        digits = load_digits()
        images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
        return Images(images, torch.from_numpy(digits.target).long()), None
    path = Path(source).expanduser()
    if path.suffix != ".npz" or not path.is_file():
        raise ConfigError(
            f"data: {source!r} is not there; give digits, or the path of an .npz file of images and labels"
        )
    with np.load(path, allow_pickle=False) as arrays:
        missing = [n for n in ("train_images", "train_labels", "test_images", "test_labels") if n not in arrays]
        if missing:
            raise ConfigError(f"data: {path} has no {', '.join(missing)}; it has {', '.join(arrays.files)}")
        train, test = (
            Images(
                torch.from_numpy(arrays[f"{part}_images"]).permute(0, 3, 1, 2).float() / 255,
                torch.from_numpy(arrays[f"{part}_labels"]).long(),
            )
            for part in ("train", "test")
        )
    return train, test


def split_images(source: str, train: int, validation: int, unlabeled: int, seed: int) -> Splits:
    """Draw disjoint sets of these sizes, every class in its share; what is left over is the test set, or else its own.

    Raises:
        ConfigError: as :func:`load_images`, and if there are too few images.
    """
    everything, test = load_images(source)
    needed = train + validation + unlabeled
    classes = len(everything.labels.unique())
    spare = 0 if test is not None else classes
    if needed > len(everything.labels) - spare:
        raise ConfigError(
            f"data: train_size + validation_size + unlabeled_size = {needed}, but {source} has "
            f"{len(everything.labels)} images{', and some must be left for the test' if spare else ''}; lower one"
        )
    parts = []
    rest = np.arange(len(everything.labels))
    for size, option in ((train, "train_size"), (validation, "validation_size"), (unlabeled, "unlabeled_size")):
        if size < classes:
            raise ConfigError(
                f"data: {option}={size} is less than one image for each of the {classes} classes; raise it"
            )
        part, rest = _draw(rest, size, everything.labels, seed)
        parts.append(everything.take(part))
    left = everything.take(rest) if test is None else test
    return Splits(*(part.normalized(parts[0]) for part in (*parts, left)))


def _draw(indices: np.ndarray, size: int, labels: Tensor, seed: int) -> tuple[np.ndarray, np.ndarray]:
    if size == len(indices):
        return indices, indices[:0]
    drawn, rest = train_test_split(indices, train_size=size, stratify=labels[indices].numpy(), random_state=seed)
    return drawn, rest


def batches(images: Images, batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
    """Batches (images, labels) in a new random order each time; one of all images where there are fewer."""
    data = TensorDataset(*images)
    size = min(batch_size, len(data))
    return DataLoader(data, sampler=BatchSampler(RandomSampler(data), size, drop_last=True), batch_size=None)


def small_student(image_channels: int, classes: int) -> nn.Module:
    """A three-layer convolutional network of some 24,000 weights, for images of 8x8 and up; logits (N, classes)."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*block(image_channels, 16, 1), *block(16, 32, 2), *block(32, 64, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))
