"""Augmentation: each image by itself, from the distributions that the papers give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from mlo import ConfigError
from problems.data.augmentation import Draws, Transforms
from problems.data.images import ArrayPixels, Images, Part
from problems.data.options import Augmentation

MANY, CPU = 8000, torch.device("cpu")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def transforms_of(images: Tensor, **options: object) -> tuple[Transforms, Draws]:
    """The transforms for images (B, C, H, W), and their draws."""
    transforms = Transforms(Augmentation(**options), images.shape[1], tuple(images.shape[2:]), CPU)
    return transforms, transforms.draw(len(images))


def moved(images: Tensor, **options: object) -> Tensor:
    transforms, draws = transforms_of(images, **options)
    return transforms.move(images, draws)


def test_a_crop_is_a_window_of_the_padded_image_at_any_offset_alike():
    images = torch.rand(MANY, 2, 5, 6)
    cropped = moved(images, crop=1)
    padded = F.pad(images, (1, 1, 1, 1))
    windows = torch.stack([padded[:, :, i : i + 5, j : j + 6] for i in range(3) for j in range(3)])
    hits = (windows == cropped).flatten(2).all(dim=2)
    assert (hits.sum(dim=0) == 1).all()
    assert (hits.float().mean(dim=1) - 1 / 9).abs().max() < 0.015


def test_half_of_the_images_are_mirrored_each_by_itself():
    images = torch.rand(MANY, 3, 2, 4)
    flipped = moved(images, flip=True)
    same = (flipped == images).flatten(1).all(1)
    assert torch.equal(flipped[~same], images[~same].flip(-1))
    assert same.float().mean() == pytest.approx(0.5, abs=0.02)
    assert (same[1:] == same[:-1]).float().mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("length", [4, 5])
def test_the_centre_of_a_cutout_is_uniform_so_the_square_hangs_over_the_edge(length):
    height, width = 8, 10
    images = torch.ones(MANY, 3, height, width)
    transforms, draws = transforms_of(images, cutout=length)
    erased = transforms.erase(images, draws) == 0
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


def one_by_one(part: Part, key: tuple[Tensor, Tensor, int], options: Augmentation) -> Images:
    """The batch of a key, image by image, with torchvision's functions and the cutout of DeVries and Taylor.

    All draws of a batch come from its seed: the crops, then the flips, then the rows and the columns of the cutouts.
    """
    (rows, labels, seed), draw = key, torch.Generator()
    draw.manual_seed(seed)
    count, (height, width) = len(rows), part.pixels.shape
    crops = torch.randint(2 * options.crop + 1, (count, 2), generator=draw) if options.crop else torch.zeros(count, 2)
    flips = torch.rand(count, generator=draw) < 0.5 if options.flip else torch.zeros(count)
    centers = [torch.randint(size, (count,), generator=draw) for size in (height, width) if options.cutout]
    images = []
    for i, row in enumerate(rows.tolist()):
        top, left = crops[i].int().tolist()
        image = v2.functional.crop(v2.functional.pad(part.pixels.array[row], options.crop), top, left, height, width)
        image = v2.functional.horizontal_flip(image) if flips[i] else image
        image = (image.float() / 255 - part.mean.view(-1, 1, 1)) / part.deviation.view(-1, 1, 1)
        if options.cutout:
            (y, x), half = (c[i].item() for c in centers), options.cutout // 2
            image[:, max(y - half, 0) : min(y + half, height), max(x - half, 0) : min(x + half, width)] = 0
        images.append(image)
    return Images(torch.stack(images), labels)


@pytest.mark.parametrize(
    "options", [{}, {"crop": 4}, {"flip": True}, {"cutout": 6}, {"crop": 2, "flip": True, "cutout": 4}], ids=str
)
@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 8, 11)])
def test_batches_have_the_bits_of_images_that_are_changed_one_by_one(options, shape):
    array = torch.randint(256, (50, *shape), dtype=torch.uint8)
    part = Part.of(ArrayPixels(array), torch.arange(50) % 7)
    part = part.normalized(*part.statistics()).take(torch.randperm(50)[:40])
    loader = part.batches(16, Augmentation(**options))
    keys = list(loader.sampler)
    assert [len(key[0]) for key in keys] == [16, 16]
    for key in keys:
        expected, found = one_by_one(part, key, Augmentation(**options)), loader.dataset[key]
        assert torch.equal(found.images, expected.images)
        assert torch.equal(found.labels, expected.labels)
        assert torch.equal(found.labels, key[0] % 7)


def test_jitter_is_torchvisions_with_darts_strengths_image_by_image():
    images = torch.rand(5, 3, 8, 8)
    torch.manual_seed(7)
    transforms, draws = transforms_of(images, jitter=0.5)
    torch.manual_seed(7)
    one = v2.ColorJitter(0.2, 0.2, 0.2, 0.1)
    assert torch.equal(transforms.recolor(images, draws), torch.stack([one(image) for image in images]))
    alike = transforms.recolor(images[:1].expand(5, 3, 8, 8), draws)
    assert not torch.equal(alike[0], alike[1])
    gray = torch.rand(2, 1, 8, 8)
    transforms, draws = transforms_of(gray, jitter=1.0)
    assert transforms.recolor(gray, draws).shape == (2, 1, 8, 8)


def test_a_resized_crop_is_torchvisions_of_the_images_shape():
    framing = Transforms(Augmentation(resized_crop=True), 3, (8, 6), CPU).framing
    assert tuple(framing.size) == (8, 6)
    assert (framing.scale, framing.ratio) == ((0.08, 1.0), (3 / 4, 4 / 3))
    assert framing(torch.rand(3, 30, 20)).shape == (3, 8, 6)


def test_nothing_is_changed_by_default():
    images = torch.rand(2, 5, 8, 8)
    transforms, draws = transforms_of(images)
    assert transforms.framing is None
    for change in (transforms.move, transforms.recolor, transforms.erase):
        assert change(images, draws) is images


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
        Transforms(Augmentation(**options), channels, (8, 9), CPU)


def test_two_ways_of_cropping_are_one_too_many():
    with pytest.raises(ConfigError, match="crop: 4 and resized_crop: true both crop the image; set one of them"):
        Augmentation(crop=4, resized_crop=True)
