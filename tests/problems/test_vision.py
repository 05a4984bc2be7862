"""Image data: what is loaded, how it is split, and how it comes in batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from mlo import ConfigError
from problems.vision import Images, batches, load_images, small_student, split_images


def rows(images: Images) -> set[bytes]:
    """The images as raw values, to compare sets of them."""
    return {(image * 1000).round().to(torch.int32).numpy().tobytes() for image in images.images}


def numbered(count: int, classes: int = 4) -> dict[str, np.ndarray]:
    """Images that carry their number in every pixel, for train and for test (from 200 on)."""
    return {
        "train_images": np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 4, 4, 3)).copy(),
        "train_labels": np.arange(count) % classes,
        "test_images": np.full((8, 4, 4, 3), 200, dtype=np.uint8),
        "test_labels": np.arange(8) % classes,
    }


def test_digits_are_all_there_between_zero_and_one():
    images, test = load_images("digits")
    assert images.images.shape == (1797, 1, 8, 8)
    assert test is None
    assert (images.images.min(), images.images.max()) == (0, 1)
    digits = load_digits()
    assert torch.equal(images.labels, torch.from_numpy(digits.target).long())
    torch.testing.assert_close(images.images[7, 0], torch.from_numpy(digits.images[7]).float() / 16)


def test_splits_are_disjoint_stratified_and_normalized_by_the_training_images():
    splits = split_images("digits", train=200, validation=100, unlabeled=800, seed=3)
    assert [len(part.labels) for part in splits] == [200, 100, 800, 697]
    raw = [rows(part) for part in splits]
    assert sum(map(len, raw)) == len(set.union(*raw)) == 1797
    for part in splits:
        shares = part.labels.bincount(minlength=10) / len(part.labels)
        assert (shares - load_images("digits")[0].labels.bincount() / 1797).abs().max() < 0.011
    assert splits.train.images.mean().abs() < 1e-5
    assert splits.train.images.std() == pytest.approx(1, abs=1e-3)
    assert splits.validation.images.mean().abs() > 1e-5


def test_a_seed_draws_its_own_split_and_the_same_one_again():
    one, again, other = (split_images("digits", 200, 100, 800, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.train.images, again.train.images)
    assert torch.equal(one.test.labels, again.test.labels)
    assert rows(one.test) != rows(other.test)


def test_an_npz_file_has_its_own_test_images(tmp_path):
    np.savez(tmp_path / "x.npz", **numbered(40))
    everything, test = load_images(str(tmp_path / "x.npz"))
    assert everything.images.shape == (40, 3, 4, 4)
    torch.testing.assert_close(everything.images[:, 1, 2, 3], torch.arange(40) / 255)
    torch.testing.assert_close(test.images, torch.full((8, 3, 4, 4), 200 / 255))
    splits = split_images(str(tmp_path / "x.npz"), 16, 8, 16, seed=0)
    assert [len(part.labels) for part in splits] == [16, 8, 16, 8]
    assert len(rows(splits.test)) == 1


def test_normalization_is_by_channel():
    images = Images(
        torch.stack([torch.randn(50, 4, 4) * 3 + 1, torch.randn(50, 4, 4) * 0.1 - 5], dim=1), torch.zeros(50)
    )
    found = images.normalized(images).images
    torch.testing.assert_close(found.mean(dim=(0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.std(dim=(0, 2, 3)), torch.ones(2))


def test_batches_show_each_image_at_most_once_a_pass_in_a_new_order():
    images = Images(torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10))
    loader = batches(images, 3)
    passes = [[label for _, labels in loader for label in labels.tolist()] for _ in range(2)]
    assert [len(set(seen)) for seen in passes] == [9, 9]
    assert passes[0] != passes[1]
    shown, labels = next(iter(loader))
    assert torch.equal(shown.flatten().long(), labels)
    assert len(next(iter(batches(images, 50)))[1]) == 10


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ((1000, 500, 297), "but digits has 1797 images, and some must be left for the test"),
        ((5, 100, 100), "train_size=5 is less than one image for each of the 10 classes"),
        ((100, 5, 100), "validation_size=5"),
        ((100, 100, 5), "unlabeled_size=5"),
    ],
)
def test_sizes_that_do_not_fit(sizes, told):
    with pytest.raises(ConfigError, match=told):
        split_images("digits", *sizes, seed=0)


def test_a_small_student_takes_small_images():
    assert small_student(1, 10)(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    assert small_student(3, 7)(torch.randn(2, 3, 32, 32)).shape == (2, 7)
