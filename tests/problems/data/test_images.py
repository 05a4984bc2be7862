"""Images and their batches: normalization, order, augmentation that resumes, files decoded when read."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from mlo import ConfigError
from mlo.levels.batches import open_stream
from mlo.ops import distributed
from problems.data.images import ArrayPixels, FilePixels, Part
from problems.data.options import Augmentation

ALL_KINDS = Augmentation(flip=True, cutout=4, resized_crop=True, jitter=1.0)


def numbered(count: int, classes: int = 4) -> Part:
    """Grey images of 2x2 whose every value is their number / 255."""
    array = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(count, 1, 2, 2)
    return Part.of(ArrayPixels(array), torch.arange(count) % classes)


def noise(count: int = 20, size: int = 12) -> Part:
    array = torch.randint(256, (count, 3, size, size), generator=torch.Generator().manual_seed(5)).byte()
    part = Part.of(ArrayPixels(array), torch.arange(count))
    return part.normalized(*part.statistics())


def files(tmp_path, count: int = 6, size: int = 12) -> Part:
    """Colour images in files, 40 wide and 30 high."""
    random = np.random.default_rng(0)
    paths = []
    for i in range(count):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(paths[-1])
    return Part.of(FilePixels(paths, size), torch.arange(count))


def test_batches_show_each_image_at_most_once_a_pass_in_a_new_order():
    part = numbered(10)
    loader = part.batches(3)
    passes = [[round(v * 255) for images, _ in loader for v in images[:, 0, 0, 0].tolist()] for _ in range(2)]
    assert [len(set(seen)) for seen in passes] == [9, 9]
    assert passes[0] != passes[1]
    assert len(loader) == 3
    shown = next(iter(loader))
    assert (shown.images.dtype, shown.labels.dtype) == (torch.float32, torch.int64)
    assert torch.equal((shown.images[:, 0, 0, 0] * 255).round().long() % 4, shown.labels)
    assert len(next(iter(part.batches(50))).labels) == 10


def test_over_many_passes_every_image_is_left_out_as_often():
    torch.manual_seed(0)
    loader = numbered(10).batches(3)
    seen = torch.zeros(10)
    for _ in range(600):
        for images, _ in loader:
            seen[(images[:, 0, 0, 0] * 255).round().long()] += 1
    assert (seen / 600 - 0.9).abs().max() < 0.05


def test_images_are_tested_in_their_order_and_the_last_batch_is_smaller():
    part = numbered(10).take(torch.tensor([7, 3, 9, 1, 2]))
    batches = [(images[:, 0, 0, 0] * 255).round().long().tolist() for images, _ in part.in_order(2)]
    assert batches == [[7, 3], [9, 1], [2]]
    assert len(part.in_order(2)) == 3
    assert torch.equal(part.load().labels, torch.tensor([3, 3, 1, 1, 2]))
    assert torch.equal(part.labels, part.load().labels)


def test_normalization_is_by_channel():
    array = torch.stack([torch.rand(700, 4, 4), torch.rand(700, 4, 4) * 0.1 + 0.8, torch.full((700, 4, 4), 0.5)], dim=1)
    part = Part.of(ArrayPixels(array), torch.zeros(700))
    mean, deviation = part.statistics()
    torch.testing.assert_close(mean, array.mean((0, 2, 3)))
    torch.testing.assert_close(deviation[:2], array.std((0, 2, 3), correction=0)[:2])
    assert deviation[2] == pytest.approx(1e-6)
    found = part.normalized(mean, deviation).load().images
    torch.testing.assert_close(found.mean(dim=(0, 2, 3)), torch.zeros(3), atol=0.1, rtol=0)
    torch.testing.assert_close(found[:, :2].std(dim=(0, 2, 3)), torch.ones(2), atol=1e-3, rtol=0)
    again = part.normalized(mean, deviation).statistics()  # of the stored values, whatever was taken out before
    torch.testing.assert_close(again, (mean, deviation))


def test_statistics_of_a_few_images_are_of_images_evenly_apart():
    mean, _ = numbered(100).statistics(at_most=3)
    assert mean.item() == pytest.approx((0 + 50 + 99) / 3 / 255)


@pytest.mark.parametrize("ahead", [0, 4])
@pytest.mark.parametrize("augmentation", [None, Augmentation(crop=2, flip=True, cutout=4), ALL_KINDS])
@pytest.mark.parametrize("source", ["arrays", "files"])
def test_a_stream_resumed_in_the_middle_of_a_pass_gives_the_same_bits(tmp_path, source, augmentation, ahead):
    part = noise() if source == "arrays" else files(tmp_path, 20)
    stream = open_stream(part.batches(4, augmentation), "p")
    for _ in range(8):  # five a pass: this is the second
        stream.next()
    stream.peek(ahead)
    state = stream.state_dict()
    expected = [stream.next() for _ in range(9)]
    torch.manual_seed(99)
    resumed = open_stream(part.batches(4, augmentation), "p")
    resumed.load_state_dict(state)
    for batch in expected:
        other = resumed.next()
        assert torch.equal(other.images, batch.images)
        assert torch.equal(other.labels, batch.labels)


def test_augmentation_draws_anew_for_each_batch_and_pass_and_leaves_the_global_state_alone():
    same = Part.of(ArrayPixels(torch.rand(1, 1, 16, 16).expand(40, 1, 16, 16)), torch.zeros(40))
    loader = same.batches(10, Augmentation(crop=8, flip=True))
    torch.manual_seed(1)
    shown = torch.cat([images for _ in range(2) for images, _ in loader]).flatten(1)
    after = torch.rand(())
    assert len({image.numpy().tobytes() for image in shown}) > 70
    torch.manual_seed(1)
    for _ in range(2):
        list(same.batches(10))
    assert torch.equal(torch.rand(()), after)


def test_the_border_of_a_crop_is_black_and_the_hole_of_a_cutout_is_the_mean():
    part = Part.of(ArrayPixels(torch.full((64, 1, 8, 8), 0.75)), torch.zeros(64))
    part = part.normalized(torch.tensor([0.5]), torch.tensor([0.25]))
    cropped = next(iter(part.batches(64, Augmentation(crop=4)))).images
    assert cropped.unique().tolist() == [-2.0, 1.0]
    assert next(iter(part.batches(64, Augmentation(cutout=4)))).images.unique().tolist() == [0.0, 1.0]


def a_pass(part: Part, monkeypatch, rank: int, world: int, augmentation=None):
    """The batches of 8 of one process of several."""
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world", lambda: world)
    torch.manual_seed(5)
    return list(part.batches(8, augmentation))


@pytest.mark.parametrize("world", [2, 4])
def test_processes_part_a_batch_among_them_and_read_no_more_than_their_share(monkeypatch, world):
    part, read = numbered(20), []
    real = ArrayPixels.read
    whole = a_pass(part, monkeypatch, 0, 1)
    monkeypatch.setattr(ArrayPixels, "read", lambda self, rows, *a: read.append(len(rows)) or real(self, rows, *a))
    shares = [a_pass(part, monkeypatch, rank, world) for rank in range(world)]
    assert set(read) == {8 // world}
    for batch, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(torch.stack([images for images, _ in parts], 1).flatten(0, 1), batch.images)
        assert torch.equal(torch.stack([labels for _, labels in parts], 1).flatten(), batch.labels)


def test_processes_augment_by_draws_of_their_own(monkeypatch):
    """Of equal images, no two processes may see the same crops."""
    same = Part.of(ArrayPixels(noise(1).pixels.array.expand(20, -1, -1, -1)), torch.zeros(20))
    first, second = (a_pass(same, monkeypatch, rank, 2, Augmentation(crop=4, cutout=6)) for rank in range(2))
    assert all(not torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))


def test_a_batch_that_cannot_be_parted_evenly_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 3)
    with pytest.raises(
        ConfigError, match=r"batch_size: a batch of 8 .* 3 processes; make it a multiple of 3, such as 6"
    ):
        numbered(20).batches(8)


def test_tested_images_are_never_augmented():
    part = noise()
    list(part.batches(4, ALL_KINDS))
    torch.testing.assert_close(
        part.load().images, (part.pixels.array.float() / 255 - part.mean[:, None, None]) / part.deviation[:, None, None]
    )


def test_files_are_resized_and_the_centre_is_cut(tmp_path):
    Image.fromarray(np.pad(np.full((14, 14, 3), 255, np.uint8), ((9, 9), (20, 20), (0, 0)))).save(tmp_path / "a.png")
    part = Part.of(FilePixels([str(tmp_path / "a.png")], 28), torch.zeros(1))  # 32x54, so nothing is resized
    expected = torch.zeros(28, 28)
    expected[7:21, 7:21] = 1
    images = part.load().images
    assert images.shape == (1, 3, 28, 28)
    torch.testing.assert_close(images[0], expected.expand(3, 28, 28))
    halved = Part.of(FilePixels([str(tmp_path / "a.png")], 14), torch.zeros(1)).load().images[0, 0]
    assert halved[4:10, 4:10].min() > 0.8
    assert halved[:3].max() < 0.1


def test_grey_files_are_read_in_colour(tmp_path):
    Image.fromarray(np.full((20, 20), 51, np.uint8)).save(tmp_path / "a.png")
    images = Part.of(FilePixels([str(tmp_path / "a.png")], 16), torch.zeros(1)).load().images
    torch.testing.assert_close(images, torch.full((1, 3, 16, 16), 0.2))


def test_a_random_crop_of_files_is_cut_from_the_whole_image(tmp_path):
    array = np.zeros((64, 64, 3), np.uint8)
    array[:, :6] = array[:, -6:] = 255  # outside of what the centre crop shows
    Image.fromarray(array).save(tmp_path / "a.png")
    part = Part.of(FilePixels([str(tmp_path / "a.png")], 16), torch.zeros(1)).take(torch.zeros(50, dtype=torch.long))
    assert part.load().images[:, :, :, 1:-1].max() < 0.3
    images = next(iter(part.batches(50, Augmentation(resized_crop=True)))).images
    assert images.shape == (50, 3, 16, 16)
    assert (images.amax((1, 2, 3)) > 0.9).sum() > 10


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_loader_processes_give_the_same_bits_as_none(tmp_path):
    part = files(tmp_path)
    part = part.normalized(*part.statistics(4))
    streams = []
    for workers in (0, 2):
        torch.manual_seed(4)
        source = Part(part.pixels, part.labels, part.rows, part.mean, part.deviation, workers)
        stream = open_stream(source.batches(2, ALL_KINDS), "p")
        streams.append([stream.next() for _ in range(5)])
    for one, other in zip(*streams, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    part = Part.of(FilePixels([str(tmp_path / "a.png")], 16), torch.zeros(1))
    with pytest.raises(ConfigError, match=r"a\.png cannot be read as an image.*repair or remove it"):
        part.load()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_arrays_on_a_gpu_are_cut_and_augmented_there_as_on_the_cpu():
    part = noise()
    there = Part(ArrayPixels(part.pixels.array.cuda()), part.labels, part.rows, part.mean, part.deviation)
    for jitter, tolerance in ((0, 0), (0.5, 1e-4)):
        batches = []
        for source in (part, there):
            torch.manual_seed(2)
            options = Augmentation(crop=2, flip=True, cutout=4, jitter=jitter)
            batches.append(next(iter(source.batches(8, options))))
        assert batches[1].images.is_cuda
        assert torch.equal(batches[1].labels.cpu(), batches[0].labels)
        torch.testing.assert_close(batches[1].images.cpu(), batches[0].images, atol=tolerance, rtol=tolerance)


def png(path, width, height, rest=b""):
    """A PNG file that says that it has this size."""

    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = chunk(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0]))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + rest + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def test_an_image_of_very_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    png(tmp_path / "large.png", 20_000, 20_000)
    part = Part.of(FilePixels([str(tmp_path / "large.png")], 16), torch.zeros(1))
    with pytest.raises(ConfigError, match=r"large\.png cannot be read as an image \(.*400000000 pixels.*remove"):
        part.load()
