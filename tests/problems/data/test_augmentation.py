"""Augmentation: each image by itself, from the distributions that the papers give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from mlo import ConfigError
from problems.data.augmentation import CropEach, CutoutEach, Each, FlipEach, make_transforms
from problems.data.options import Augmentation

MANY = 8000


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def test_a_crop_is_a_window_of_the_padded_image_at_any_offset_alike():
    images = torch.rand(MANY, 2, 5, 6)
    cropped = CropEach(1)(images)
    padded = F.pad(images, (1, 1, 1, 1))
    windows = torch.stack([padded[:, :, i : i + 5, j : j + 6] for i in range(3) for j in range(3)])
    hits = (windows == cropped).flatten(2).all(dim=2)
    assert (hits.sum(dim=0) == 1).all()
    assert (hits.float().mean(dim=1) - 1 / 9).abs().max() < 0.015


def test_half_of_the_images_are_mirrored_each_by_itself():
    images = torch.rand(MANY, 3, 2, 4)
    flipped = FlipEach()(images)
    same = (flipped == images).flatten(1).all(1)
    assert torch.equal(flipped[~same], images[~same].flip(-1))
    assert same.float().mean() == pytest.approx(0.5, abs=0.02)
    assert (same[1:] == same[:-1]).float().mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("length", [4, 5])
def test_the_centre_of_a_cutout_is_uniform_so_the_square_hangs_over_the_edge(length):
    height, width = 8, 10
    erased = CutoutEach(length)(torch.ones(MANY, 3, height, width)) == 0
    assert torch.equal(erased[:, 0], erased[:, 2])
    erased = erased[:, 0]
    assert erased.any(2).sum(1).max() == erased.any(1).sum(1).max() == length
    assert erased.any(2).sum(1).min() < length
    assert (erased.sum((1, 2)) == erased.any(2).sum(1) * erased.any(1).sum(1)).all()  # a rectangle

    def chance(size: int) -> torch.Tensor:
        centers, places = torch.arange(size)[:, None], torch.arange(size)
        first = centers - length // 2
        return ((places >= first) & (places < first + length)).float().mean(0)

    expected = torch.outer(chance(height), chance(width))
    assert (erased.float().mean(0) - expected).abs().max() < 0.02
    assert expected[0, 0] < 0.7 * expected[4, 4]


def test_an_even_cutout_is_that_of_devries_and_taylor():
    images = torch.ones(50, 1, 9, 9)
    cutout = CutoutEach(4)
    centers = cutout.make_params([images])["centers"]
    found = cutout.transform(images, {"centers": centers})
    for image, (y, x) in zip(found, centers.tolist(), strict=True):
        mask = torch.ones(9, 9)
        mask[max(y - 2, 0) : min(y + 2, 9), max(x - 2, 0) : min(x + 2, 9)] = 0
        assert torch.equal(image[0], mask)


def test_jitter_is_torchvisions_with_darts_strengths_image_by_image():
    images = torch.rand(5, 3, 8, 8)
    transforms = make_transforms(Augmentation(jitter=0.5), 3, (8, 8))
    torch.manual_seed(7)
    found = transforms.pixels(images)
    torch.manual_seed(7)
    one = v2.ColorJitter(0.2, 0.2, 0.2, 0.1)
    assert torch.equal(found, torch.stack([one(image) for image in images]))
    alike = transforms.pixels(images[:1].expand(5, 3, 8, 8))
    assert not torch.equal(alike[0], alike[1])
    assert make_transforms(Augmentation(jitter=1.0), 1, (8, 8)).pixels(torch.rand(2, 1, 8, 8)).shape == (2, 1, 8, 8)


def test_a_resized_crop_is_torchvisions_of_the_images_shape():
    framing = make_transforms(Augmentation(resized_crop=True), 3, (8, 6)).framing
    assert tuple(framing.size) == (8, 6)
    assert (framing.scale, framing.ratio) == ((0.08, 1.0), (3 / 4, 4 / 3))
    assert framing(torch.rand(3, 30, 20)).shape == (3, 8, 6)


def test_nothing_is_changed_by_default():
    transforms = make_transforms(Augmentation(), 5, (8, 8))
    images = torch.rand(2, 5, 8, 8)
    assert transforms.framing is None
    assert torch.equal(transforms.normalized(transforms.pixels(images)), images)
    assert torch.equal(Each(v2.Identity())(images), images)


@pytest.mark.parametrize(
    ("options", "channels", "message"),
    [
        ({"jitter": 0.5}, 2, "jitter: 0.5 was given, but the images have 2 channels.*write jitter: 0"),
        ({"cutout": 16}, 1, "cutout: 16 was given, but the images are 8x9 pixels; write at most 8"),
        ({"crop": 9}, 1, "crop: 9 was given.*write at most 8"),
    ],
)
def test_what_does_not_fit_the_images(options, channels, message):
    with pytest.raises(ConfigError, match=message):
        make_transforms(Augmentation(**options), channels, (8, 9))


def test_two_ways_of_cropping_are_one_too_many():
    with pytest.raises(ConfigError, match="crop: 4 and resized_crop: true both crop the image; set one of them"):
        Augmentation(crop=4, resized_crop=True)
