"""Splitting the images of a source into disjoint parts: training, validation, unlabeled and test images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from mlo import ConfigError
from problems.data.images import FilePixels, Part
from problems.data.locations import data_root
from problems.data.options import Data
from problems.data.sources import LoadOptions, load_source

STATISTICS_FROM = 2048  # number of images for mean and deviation, if images must be decoded


class Splits(NamedTuple):
    """Parts of the data; train, validation, unlabeled and test are disjoint.

    All are normalized by the mean and deviation of each channel of the training images (of 2,048 of them, if they are
    decoded from files).

    Attributes:
        train: for training weights.
        validation: for judging the architecture.
        unlabeled: images whose labels are not used.
        test: not used in any training.
        labeled: train and validation together, for the final training.
        everything: all labeled images of the source but the test images, for a final training on the whole data set.
    """

    train: Part
    validation: Part
    unlabeled: Part
    test: Part
    labeled: Part
    everything: Part

    @property
    def image_channels(self) -> int:
        """Channels of the images."""
        return self.train.pixels.image_channels

    @property
    def classes(self) -> int:
        """The number of classes of the labeled images."""
        return int(self.everything.labels.max()) + 1

    @property
    def image_size(self) -> int:
        """Height of the images, in pixels."""
        return self.train.pixels.shape[0]


def load_splits(data: Data, seed: int, device: torch.device | None = None) -> Splits:
    """Load the images and split them at random. If the source has no test images, those left over are the test images.

    Args:
        data: the options.
        seed: the same seed gives the same split.
        device: of the run; None: the CPU. Images from arrays are stored there if they fit.

    Raises:
        ConfigError: if a source is missing or invalid, or if it has too few images.
    """
    options = LoadOptions(data_root(data.root), data.download, data.image_size, device, data.workers)
    labeled, test = load_source(data.source, options)
    other = None if data.unlabeled_source is None else _load_unlabeled(data, labeled, options)
    parts, rest = _draw(data, labeled, test is None, np.random.default_rng(seed))
    left = parts.get("held_out_size", rest if test is None else rest[:0])
    if len(left):
        test = labeled.take(left)
    assert test is not None
    train, validation = (labeled.take(parts[option]) for option in ("train_size", "validation_size"))
    if other is not None:
        unlabeled = _subset(other, data.unlabeled_size, "unlabeled_size", seed)
    else:
        unlabeled = labeled.take(parts["unlabeled_size"])
    splits = Splits(
        train=train,
        validation=validation,
        unlabeled=unlabeled,
        test=_subset(test, data.test_size, "test_size", seed),
        labeled=labeled.take(np.concatenate([parts["train_size"], parts["validation_size"]])),
        everything=labeled.take(np.setdiff1d(np.arange(len(labeled)), left)),
    )
    mean, deviation = train.statistics(STATISTICS_FROM if isinstance(train.pixels, FilePixels) else None)
    return Splits(*(part.normalized(mean, deviation) for part in splits))


def _load_unlabeled(data: Data, labeled: Part, options: LoadOptions) -> Part:
    """The images of ``unlabeled_source``, resized to the shape of the labeled ones."""
    options = options._replace(image_size=labeled.pixels.shape[0], named_by="data.unlabeled_source")
    other = load_source(str(data.unlabeled_source), options).labeled
    channels, given = labeled.pixels.image_channels, other.pixels.image_channels
    if channels != given:
        raise ConfigError(
            f"data.unlabeled_source: the images of {data.unlabeled_source} have {given} channels, and those of "
            f"{data.source} have {channels}; give a source with {channels}"
        )
    if labeled.pixels.shape != other.pixels.shape:
        raise ConfigError(
            f"data.unlabeled_source: the images of {data.source} are not square, so those of "
            f"{data.unlabeled_source} cannot be resized to their shape; set data.image_size"
        )
    return other


def _draw(
    data: Data, labeled: Part, test_is_remainder: bool, random: np.random.Generator
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Positions of the labeled images that are drawn for each size option, and of those left over."""
    labels = labeled.labels.numpy()
    parts: dict[str, np.ndarray] = {}
    rest = np.arange(len(labels))
    for option, size in _sizes(data, len(labels), int(labels.max()) + 1, test_is_remainder).items():
        parts[option], rest = _stratified(rest, size, labels, random)
    return parts, rest


def _sizes(data: Data, count: int, classes: int, test_is_remainder: bool) -> dict[str, int]:
    """How many of the ``count`` labeled images are drawn for each size option, in the order of drawing."""
    wanted = {"train_size": data.train_size, "validation_size": data.validation_size}
    if data.unlabeled_source is None:
        wanted["unlabeled_size"] = data.unlabeled_size
    if data.held_out_size is not None:
        wanted = {"held_out_size": data.held_out_size, **wanted}
        test_is_remainder = False
    remainders = [option for option, size in wanted.items() if size is None] + ["the test"] * test_is_remainder
    if len(remainders) > 1:
        raise ConfigError(
            f"data: the images that are left over cannot be used for both {' and '.join(remainders)}; "
            f"write a number for {' and '.join(remainders[:-1])}"
        )
    given = {option: size for option, size in wanted.items() if size is not None}
    needed = sum(given.values())
    if needed > count - classes * len(remainders):
        must = f", and some must be left for {remainders[0]}" if remainders else ""
        raise ConfigError(
            f"data: {' + '.join(given)} = {needed}, but {data.source} has {count} images{must}; lower one of them"
        )
    sizes = {option: count - needed if size is None else size for option, size in wanted.items()}
    for option, size in sizes.items():
        _check_classes(option, size, classes)
    return sizes


def _check_classes(option: str, size: int, classes: int) -> None:
    if size < classes:
        raise ConfigError(f"data: {option}={size} is less than one image for each of the {classes} classes; raise it")


def _subset(part: Part, size: int | None, option: str, seed: int) -> Part:
    """``size`` images of a part, with the proportions of the classes; None: all."""
    if size is None:
        return part
    if size > len(part):
        raise ConfigError(f"data: {option}={size}, but there are {len(part)} images; lower it, or write null for all")
    labels = part.labels.numpy()
    _check_classes(option, size, len(np.unique(labels)))
    return part.take(_stratified(np.arange(len(part)), size, labels, np.random.default_rng(seed))[0])


def _stratified(
    positions: np.ndarray, size: int, labels: np.ndarray, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """``size`` of the positions in random order, with the proportions of the classes, and the other positions."""
    order = random.permutation(positions)
    grouped = order[np.argsort(labels[order], kind="stable")]
    counts = np.unique(labels[grouped], return_counts=True)[1]
    sizes, remainders = np.divmod(counts * size, len(positions))
    largest = np.lexsort((random.random(len(counts)), -remainders))
    sizes[largest[: size - sizes.sum()]] += 1
    starts = np.cumsum(counts) - counts
    chosen = np.arange(len(positions)) - np.repeat(starts, counts) < np.repeat(sizes, counts)
    return random.permutation(grouped[chosen]), np.sort(grouped[~chosen])
