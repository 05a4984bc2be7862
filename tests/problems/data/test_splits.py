"""Which images are used for what: sizes, shares of the classes, disjoint parts, normalization."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mlo import ConfigError
from mlo.options.config import validate
from problems.data.images import Part
from problems.data.locations import data_root
from problems.data.options import Data
from problems.data.sources import LoadOptions, load_source

CIFAR10 = data_root(None) / "cifar10.npz"


def rows(part: Part) -> set[int]:
    return set(part.rows.tolist())


@pytest.fixture
def source(tmp_path):
    """An .npz file of 120 colour images of 6x6, and 30 for the test; class 0 has half of them."""
    random = np.random.default_rng(0)
    classes = np.array([0, 1, 0, 2])
    np.savez(
        tmp_path / "x.npz",
        train_images=random.integers(0, 256, (120, 6, 6, 3), dtype=np.uint8),
        train_labels=classes[np.arange(120) % 4],
        test_images=random.integers(0, 256, (30, 6, 6, 3), dtype=np.uint8),
        test_labels=classes[np.arange(30) % 4],
    )
    return str(tmp_path / "x.npz")


def test_parts_are_disjoint_stratified_and_normalized_by_the_training_images():
    splits = Data(train_size=200, validation_size=100, unlabeled_size=800).splits(seed=3)
    parts = [splits.train, splits.validation, splits.unlabeled, splits.test]
    assert [len(part) for part in parts] == [200, 100, 800, 697]
    assert len(set.union(*map(rows, parts))) == 1797
    everything = load_source("digits", LoadOptions(data_root(None))).labeled
    shares = everything.labels.bincount() / 1797
    for part in parts:
        assert (part.labels.bincount(minlength=10) - shares * len(part)).abs().max() < 3.1
        raw, labels = everything.take(part.rows).load()
        images, found = part.load()
        assert torch.equal(labels, found)
        torch.testing.assert_close(images * splits.train.deviation + splits.train.mean, raw, atol=1e-5, rtol=0)
    images = splits.train.load().images
    assert images.mean().abs() < 1e-5
    assert images.std() == pytest.approx(1, abs=1e-3)
    assert splits.validation.load().images.mean().abs() > 1e-5
    assert (splits.image_channels, splits.classes, splits.image_size) == (1, 10, 8)


def test_labeled_is_train_and_validation_and_everything_is_all_but_the_test():
    splits = Data().splits(seed=0)
    assert rows(splits.labeled) == rows(splits.train) | rows(splits.validation)
    assert len(splits.labeled) == 400
    assert rows(splits.everything) == set(range(1797)) - rows(splits.test)
    assert len(splits.everything) == 1200


def test_a_source_with_test_images_keeps_them(source):
    splits = Data(source=source, train_size=40, validation_size=20, unlabeled_size=24).splits(seed=0)
    assert len(splits.test) == 30
    assert torch.equal(splits.test.pixels.array, load_source(source, LoadOptions(data_root(None))).test.pixels.array)
    assert len(splits.everything) == 120
    assert splits.train.labels.bincount().tolist() == [20, 10, 10]
    assert (splits.image_channels, splits.classes, splits.image_size) == (3, 3, 6)


def test_held_out_images_are_the_test_and_no_other_part(source):
    options = {"source": source, "held_out_size": 20, "validation_size": 20, "unlabeled_size": 24}
    splits = Data(train_size=56, **options).splits(seed=0)
    assert [len(part) for part in splits] == [56, 20, 24, 20, 76, 100]
    assert splits.test.pixels is splits.train.pixels
    assert rows(splits.test).isdisjoint(rows(splits.everything))
    assert len(set.union(*map(rows, splits))) == 120
    again = Data(train_size=30, **options).splits(seed=0)
    assert rows(again.test) == rows(splits.test)  # whatever else is drawn
    digits = Data(held_out_size=100, unlabeled_size=None).splits(seed=0)
    assert [len(part) for part in digits] == [200, 200, 1297, 100, 400, 1697]


def test_a_seed_draws_its_own_parts_and_the_same_ones_again():
    one, again, other = (Data(test_size=100).splits(seed=s) for s in (1, 1, 2))
    for part, same, different in zip(one, again, other, strict=True):
        assert torch.equal(part.rows, same.rows)
        assert rows(part) != rows(different)


def test_a_part_is_in_no_order_of_classes():
    labels = Data().splits(seed=0).train.labels
    assert (labels[1:] >= labels[:-1]).float().mean() < 0.7


def test_null_is_what_is_left_over(source):
    splits = Data(source=source, train_size=50, validation_size=None, unlabeled_size=30).splits(seed=0)
    assert [len(part) for part in splits] == [50, 40, 30, 30, 90, 120]


def test_all_but_one_image_can_be_drawn(source):
    splits = Data(source=source, train_size=59, validation_size=30, unlabeled_size=30).splits(seed=0)
    assert len(rows(splits.train) | rows(splits.validation) | rows(splits.unlabeled)) == 119
    assert len(Data(source=source, train_size=60, validation_size=30, unlabeled_size=30).splits(seed=0).train) == 60


def test_a_part_of_the_test_images(source):
    splits = Data(source=source, train_size=40, validation_size=40, unlabeled_size=40, test_size=12).splits(seed=0)
    assert sorted(splits.test.labels.bincount().tolist()) == [3, 3, 6]
    assert len(rows(splits.test)) == 12
    digits = Data(test_size=50).splits(seed=0)
    assert len(digits.test) == 50
    assert rows(digits.test).isdisjoint(rows(digits.everything))
    assert len(digits.everything) == 1200


def test_unlabeled_images_of_another_source(source, tmp_path):
    random = np.random.default_rng(1)
    np.savez(
        tmp_path / "other.npz",
        train_images=random.integers(0, 20, (70, 9, 9, 3), dtype=np.uint8),
        train_labels=np.arange(70) % 7,
        test_images=np.zeros((7, 9, 9, 3), np.uint8),
        test_labels=np.arange(7),
    )
    options = {"source": source, "unlabeled_source": str(tmp_path / "other.npz"), "validation_size": None}
    splits = Data(train_size=60, unlabeled_size=None, **options).splits(seed=0)
    assert [len(part) for part in splits] == [60, 60, 70, 30, 120, 120]
    images = splits.unlabeled.load().images
    assert images.shape == (70, 3, 6, 6)
    assert images.max() < -1  # normalized as the training images are
    assert splits.classes == 3
    some = Data(train_size=60, unlabeled_size=14, **options).splits(seed=0).unlabeled
    assert some.labels.bincount().tolist() == [2] * 7
    with pytest.raises(ConfigError, match="unlabeled_size=71, but there are 70 images"):
        Data(train_size=60, unlabeled_size=71, **options).splits(seed=0)


def test_unlabeled_images_of_other_channels(source):
    data = Data(source=source, train_size=60, validation_size=60, unlabeled_source="digits")
    message = (
        "data.unlabeled_source: the images of digits have 1 channels, and those of .* have 3; give a source with 3"
    )
    with pytest.raises(ConfigError, match=message):
        data.splits(seed=0)


def test_the_source_is_no_other_source():
    with pytest.raises(ConfigError, match="unlabeled_source: digits is the same as source"):
        Data(unlabeled_source="digits")


def test_the_source_in_another_spelling_is_no_other_source(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(source, "cifar10.npz")
    Path("link.npz").symlink_to("cifar10.npz")
    Path("images/train").mkdir(parents=True)
    Path("linked").symlink_to("images")
    spellings = ["cifar10", "cifar10.npz", "./cifar10.npz", str(tmp_path / "cifar10.npz"), "link.npz"]
    pairs = [*itertools.permutations(spellings, 2), ("images", "images/"), ("images", "linked")]
    for one, other in pairs:
        with pytest.raises(ConfigError, match="is the same as source"):
            Data(source=one, unlabeled_source=other, root=".")
    Path("digits").mkdir()
    for one, other in (("digits", "./digits"), ("cifar10", "cifar100"), ("cifar10", source), ("images", ".")):
        Data(source=one, unlabeled_source=other, root=".")


def test_a_folder_of_files_is_split_and_normalized(tmp_path):
    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                image = random.integers(0, 200, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(image).save(tmp_path / part / name / f"{i}.png")
    data = Data(source=str(tmp_path), train_size=10, validation_size=6, unlabeled_size=8, image_size=21)
    splits = data.splits(seed=0)
    assert [len(part) for part in splits] == [10, 6, 8, 8, 16, 24]
    assert splits.train.labels.bincount().tolist() == [5, 5]
    images = splits.train.load().images
    assert images.shape == (10, 3, 21, 21)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    mixed = Data(source="digits", unlabeled_source=str(tmp_path), unlabeled_size=None)
    with pytest.raises(ConfigError, match="have 3 channels, and those of digits have 1"):
        mixed.splits(seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train_size": 1000, "validation_size": 500, "unlabeled_size": 297},
            r"train_size \+ validation_size \+ unlabeled_size = 1797, but digits has 1797 images, "
            "and some must be left for the test",
        ),
        ({"train_size": 5}, "train_size=5 is less than one image for each of the 10 classes"),
        ({"validation_size": 5}, "validation_size=5"),
        ({"unlabeled_size": 5}, "unlabeled_size=5"),
        ({"held_out_size": 5}, "held_out_size=5"),
        ({"test_size": 5}, "test_size=5 is less"),
        ({"test_size": 598}, "test_size=598, but there are 597 images; lower it"),
        ({"train_size": None}, "left over cannot be used for both train_size and the test; write a number for train"),
        (
            {"train_size": None, "validation_size": None, "held_out_size": 100},
            "cannot be used for both train_size and validation_size",
        ),
        (
            {"train_size": None, "unlabeled_size": 1500, "held_out_size": 100},
            r"held_out_size \+ validation_size \+ unlabeled_size = 1800, .* must be left for train_size",
        ),
    ],
)
def test_sizes_that_do_not_fit(options, message):
    with pytest.raises(ConfigError, match=message):
        Data(**options).splits(seed=0)


def test_options_are_strict():
    with pytest.raises(ConfigError, match="train_sizes: unknown option; did you mean train_size"):
        validate(Data, {"train_sizes": 3}, "data")
    assert all(field.description for field in Data.model_fields.values())


@pytest.mark.skipif(not CIFAR10.is_file(), reason=f"needs {CIFAR10}")
def test_the_ablations_on_cifar10():
    options = {"root": str(CIFAR10.parent), "train_size": 20_000, "validation_size": None, "unlabeled_size": 5_000}
    splits = Data(source="cifar10", held_out_size=5_000, **options).splits(seed=0)
    assert [len(part) for part in splits] == [20_000, 20_000, 5_000, 5_000, 40_000, 45_000]
    for part in splits:
        assert part.labels.bincount().tolist() == [len(part) // 10] * 10
    assert len(Data(source="cifar10", **options).splits(seed=0).everything) == 50_000
    images, _ = next(iter(splits.train.batches(500)))
    assert images.mean().abs() < 0.1
    assert images.std().item() == pytest.approx(1, abs=0.1)
