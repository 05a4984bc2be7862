"""Sources of images: each kind as it lies on disk, and the errors when it is not valid."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

from mlo import ConfigError
from problems.data import sources
from problems.data.archives import read_idx
from problems.data.locations import data_root
from problems.data.sources import DEBIAN_FASHION_MNIST, LoadOptions, load_source

CIFAR10 = data_root(None) / "cifar10.npz"
RANDOM = np.random.default_rng(0)


def arrays(count: int = 40, classes: int = 4, side: int = 4) -> dict[str, np.ndarray]:
    """Images that carry their number in every pixel, for train and for test (200)."""
    numbers = np.arange(count, dtype=np.uint8)[:, None, None, None]
    return {
        "train_images": np.broadcast_to(numbers, (count, side, side, 3)).copy(),
        "train_labels": np.arange(count) % classes,
        "test_images": np.full((8, side, side, 3), 200, dtype=np.uint8),
        "test_labels": np.arange(8) % classes,
    }


def class_folders(path: Path, counts: dict[str, int]) -> None:
    for number, (name, count) in enumerate(counts.items()):
        (path / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.full((20, 30, 3), 10 * number + i, np.uint8)).save(path / name / f"{i}.png")


def test_digits_are_all_there_between_zero_and_one():
    part, test = load_source("digits", LoadOptions(Path()))
    assert test is None
    images, labels = part.load()
    assert images.shape == (1797, 1, 8, 8)
    assert (images.min(), images.max()) == (0, 1)
    digits = load_digits()
    assert torch.equal(labels, torch.from_numpy(digits.target).long())
    torch.testing.assert_close(images[7, 0], torch.from_numpy(digits.images[7]).float() / 16)


def test_an_npz_file_has_its_own_test_images(tmp_path):
    np.savez(tmp_path / "x.npz", **arrays())
    part, test = load_source(str(tmp_path / "x.npz"), LoadOptions(Path()))
    images, labels = part.load()
    assert images.shape == (40, 3, 4, 4)
    torch.testing.assert_close(images[:, 1, 2, 3], torch.arange(40) / 255)
    assert torch.equal(labels, torch.arange(40) % 4)
    torch.testing.assert_close(test.load().images, torch.full((8, 3, 4, 4), 200 / 255))
    assert part.pixels.array.dtype == torch.uint8


def test_channels_rows_and_columns_of_an_npz_file_stay_apart(tmp_path):
    given = arrays()
    given["train_images"] = RANDOM.integers(0, 256, (40, 4, 5, 3), dtype=np.uint8)
    given["test_images"] = given["test_images"][:, :, [0, 0, 0, 0, 0]]
    np.savez(tmp_path / "x.npz", **given)
    part, _ = load_source(str(tmp_path / "x.npz"), LoadOptions(Path()))
    assert part.pixels.shape == (4, 5)
    assert part.load().images[3, 2, 1, 4].item() == pytest.approx(given["train_images"][3, 1, 4, 2] / 255)


def test_images_of_arrays_are_resized_with_antialiasing(tmp_path):
    given = arrays(side=8)
    given["train_images"][0, :, [0, 3, 4, 7]] = 255  # stripes that interpolation without antialiasing would miss
    given["train_images"][0, :, [1, 2, 5, 6]] = 0
    np.savez(tmp_path / "x.npz", **given)
    part, test = load_source(str(tmp_path / "x.npz"), LoadOptions(Path(), image_size=2))
    assert part.pixels.shape == test.pixels.shape == (2, 2)
    images = part.load().images
    assert (images[0] - 0.5).abs().max() < 0.1
    torch.testing.assert_close(images[7], torch.full((3, 2, 2), 7 / 255))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_images": np.zeros((40, 4, 4, 3))}, r"train_images are float64 of shape.*use uint8 of shape \(N, H"),
        ({"train_images": np.zeros((40, 4, 4), np.uint8)}, r"shape \(40, 4, 4\)"),
        ({"train_images": np.uint8(3)}, r"train_images are uint8 of shape \(\): use"),
        ({"train_images": np.zeros((40, 0, 4, 3), np.uint8)}, r"shape \(40, 0, 4, 3\): use"),
        ({"train_labels": np.arange(40.0)}, "train_labels are float64"),
        ({"test_labels": np.arange(7)}, "there are 7 test_labels for 8 test_images: give one label for each image"),
        ({"train_labels": np.arange(40) % 4 + 1}, "no image has label 0: number the classes from 0 without gaps"),
        ({"train_labels": np.arange(40) % 4 - 1}, "train_labels contain -1"),
        ({"test_labels": np.arange(8)}, "test_labels contain 4, which train_labels do not: remove"),
        ({"test_images": np.zeros((8, 5, 4, 3), np.uint8)}, r"test_images have .* \(5, 4, 3\), and train_images \(4"),
    ],
)
def test_arrays_that_cannot_be_used(tmp_path, change, message):
    np.savez(tmp_path / "x.npz", **{**arrays(), **change})
    with pytest.raises(ConfigError, match=r"data.source: .*x.npz cannot be used") as raised:
        load_source(str(tmp_path / "x.npz"), LoadOptions(Path()))
    assert raised.match(message)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text("no arrays, but a letter"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-300]),
        lambda path: np.savez(path, **{**arrays(), "train_labels": np.array([{}] * 40)}),
        lambda path: np.save(path.open("wb"), np.zeros(3)),
    ],
)
def test_an_npz_file_that_is_none(tmp_path, spoil):
    path = tmp_path / "x.npz"
    np.savez(path, **arrays())
    spoil(path)
    with pytest.raises(
        ConfigError, match=r"data.source: .*x.npz cannot be read \(.*numpy.savez and train_images, .*uint8"
    ):
        load_source(str(path), LoadOptions(Path()))


def test_an_npz_file_that_lacks_an_array(tmp_path):
    np.savez(tmp_path / "x.npz", train_images=np.zeros(3))
    with pytest.raises(ConfigError, match="has no train_labels, test_images, test_labels; it has train_images"):
        load_source(str(tmp_path / "x.npz"), LoadOptions(Path()))


def test_a_name_that_is_none():
    with pytest.raises(
        ConfigError, match=r"data.source: 'cifar' does not exist; did you mean cifar10\?.*fashion_mnist"
    ):
        load_source("cifar", LoadOptions(Path()))
    with pytest.raises(ConfigError, match=r"data.unlabeled_source: '/no/such.npz' does not exist; give digits"):
        load_source("/no/such.npz", LoadOptions(Path(), named_by="data.unlabeled_source"))


def test_the_root_is_given_or_in_the_environment(monkeypatch):
    monkeypatch.setenv("MLO_DATA", "/somewhere")
    assert data_root(None) == Path("/somewhere")
    assert data_root("~/here") == Path.home() / "here"
    monkeypatch.delenv("MLO_DATA")
    assert data_root(None) == Path.home() / ".cache/mlo/data"


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist"])
def test_a_data_set_that_is_not_there(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    with pytest.raises(ConfigError, match=f"{name} was not found in {tmp_path}.*download: true.*data.root"):
        load_source(name, LoadOptions(tmp_path))


def test_cifar_in_an_npz_file_of_the_root(tmp_path):
    np.savez(tmp_path / "cifar100.npz", **arrays())
    assert len(load_source("cifar100", LoadOptions(tmp_path)).labeled) == 40


@pytest.mark.skipif(not CIFAR10.is_file(), reason=f"needs {CIFAR10}")
def test_cifar10_as_it_is():
    part, test = load_source("cifar10", LoadOptions(CIFAR10.parent))
    assert (len(part), len(test)) == (50_000, 10_000)
    assert part.labels.bincount().tolist() == [5000] * 10
    mean, deviation = part.statistics()
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=1e-4, rtol=0)  # as DARTS has them
    torch.testing.assert_close(deviation, torch.tensor([0.2470, 0.2435, 0.2616]), atol=1e-4, rtol=0)


def torchvision_cifar(root: Path, kind: type, labels: str, monkeypatch) -> np.ndarray:
    """CIFAR's files with 20 training and 10 test images; returns the training images (20, 3, 32, 32)."""
    folder = root / kind.base_folder
    folder.mkdir()

    def write(name: str, content: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    images = RANDOM.integers(0, 256, (30, 3072), dtype=np.uint8)
    some = {"train": slice(20), "test": slice(20, 30)}
    lists = {
        part: [[part, write(part, {"data": images[rows], labels: [i % 5 for i in range(30)][rows]})]]
        for part, rows in some.items()
    }
    monkeypatch.setattr(kind, "train_list", lists["train"])
    monkeypatch.setattr(kind, "test_list", lists["test"])
    meta = write("names", {"names": list("abcde")})
    monkeypatch.setattr(kind, "meta", {"filename": "names", "key": "names", "md5": meta})
    return images[:20].reshape(20, 3, 32, 32)


@pytest.mark.parametrize(
    ("name", "kind", "labels"),
    [("cifar10", datasets.CIFAR10, "labels"), ("cifar100", datasets.CIFAR100, "fine_labels")],
)
def test_cifar_in_torchvisions_files(name, kind, labels, tmp_path, monkeypatch):
    images = torchvision_cifar(tmp_path, kind, labels, monkeypatch)
    np.savez(tmp_path / f"{name}.npz", **arrays())  # torchvision's files come first
    part, test = load_source(name, LoadOptions(tmp_path))
    assert torch.equal(part.pixels.array, torch.from_numpy(images))
    assert (part.labels.tolist(), len(test)) == ([i % 5 for i in range(20)], 10)
    (tmp_path / kind.base_folder / "train").write_bytes(b"broken")
    with pytest.raises(ConfigError, match=f"torchvision cannot load {name}.*corrupted.*remove the broken files"):
        load_source(name, LoadOptions(tmp_path))


def test_download_is_torchvisions_and_its_failure_is_reported(tmp_path, monkeypatch):
    asked = []

    def fail(self):
        asked.append(self.root)
        raise OSError("no network")

    monkeypatch.setattr(datasets.CIFAR100, "download", fail)
    with pytest.raises(ConfigError, match=r"cannot load cifar100.*no network"):
        load_source("cifar100", LoadOptions(tmp_path, download=True))
    assert asked == [tmp_path]


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return header + array.tobytes()


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_in_torchvisions_folder_comes_first(packed, tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = RANDOM.integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for prefix in ("train", "t10k"):
        for name, array in (("images-idx3", images), ("labels-idx1", np.arange(20, dtype=np.uint8) % 10)):
            content = idx(array)
            file = raw / f"{prefix}-{name}-ubyte{'.gz' * packed}"
            file.write_bytes(gzip.compress(content) if packed else content)
    part, test = load_source("fashion_mnist", LoadOptions(tmp_path))
    assert torch.equal(part.pixels.array, torch.from_numpy(images).unsqueeze(1))
    assert test.labels.tolist() == [i % 10 for i in range(20)]
    broken = next(raw.glob("t10k-images*"))
    broken.write_bytes(broken.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"cannot be read from .*t10k-images.*replace the four files"):
        load_source("fashion_mnist", LoadOptions(tmp_path))
    broken.unlink()
    with pytest.raises(ConfigError, match=r"no t10k-images-idx3-ubyte or t10k-images-idx3-ubyte.gz"):
        load_source("fashion_mnist", LoadOptions(tmp_path))


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason=f"needs {DEBIAN_FASHION_MNIST}")
def test_fashion_mnist_of_debian(tmp_path):
    part, test = load_source("fashion_mnist", LoadOptions(tmp_path))
    assert part.pixels.array.shape == (60_000, 1, 28, 28)
    assert part.labels.bincount().tolist() == [6000] * 10
    assert len(test) == 10_000
    assert part.statistics()[0].item() == pytest.approx(0.2860, abs=1e-4)
    assert part.labels[0] == 9  # an ankle boot


@pytest.mark.parametrize("name", ["val", "test"])
def test_a_folder_of_files(name, tmp_path):
    class_folders(tmp_path / "train", {"cat": 3, "dog": 2})
    class_folders(tmp_path / name, {"cat": 1, "dog": 1})
    part, test = load_source(str(tmp_path), LoadOptions(Path(), image_size=16, workers=0))
    assert part.labels.tolist() == [0, 0, 0, 1, 1]
    images, _ = part.load()
    assert images.shape == (5, 3, 16, 16)
    torch.testing.assert_close(images[:, 0, 0, 0] * 255, torch.tensor([0.0, 1, 2, 10, 11]))
    assert len(test) == 2
    assert load_source(str(tmp_path), LoadOptions(Path(), workers=3)).labeled.workers == 3
    assert load_source(str(tmp_path), LoadOptions(Path())).labeled.pixels.shape == (224, 224)


def test_folders_that_are_not_as_they_should_be(tmp_path):
    def fails(match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            load_source(str(tmp_path), LoadOptions(Path()))

    fails(r"should contain train/ and test/ \(or val/\).*it contains nothing")
    class_folders(tmp_path / "train", {"cat": 1, "dog": 1})
    fails("it contains train")
    class_folders(tmp_path / "val", {"cat": 1, "cow": 1})
    fails("class folders cow, dog are in only one of")
    shutil.rmtree(tmp_path / "val" / "cow")
    (tmp_path / "val" / "dog").mkdir()
    fails("should contain train/ and val/.*dog")


def test_imagenet_of_torchvision(tmp_path):
    root = tmp_path / "imagenet"
    for part in ("train", "val"):
        class_folders(root / part, {"n01440764": 2, "n01443537": 1})
    with pytest.raises(ConfigError, match=r"ImageNet was not found in .*imagenet.*ILSVRC2012_devkit_t12.tar.gz"):
        load_source("imagenet", LoadOptions(tmp_path))
    names = {"n01440764": ("tench",), "n01443537": ("goldfish",)}
    torch.save((names, []), root / "meta.bin")
    part, test = load_source("imagenet", LoadOptions(tmp_path, image_size=32))
    assert part.labels.tolist() == test.labels.tolist() == [0, 0, 1]
    assert part.load().images.shape == (3, 3, 32, 32)


def bomb(path: Path, name: str, header: bytes, zeros: int = 0) -> None:
    """Replace one array of a good file by other bytes, compressed."""
    np.savez(path, **arrays())
    with zipfile.ZipFile(path) as file:
        others = {info: file.read(info) for info in file.namelist() if info != f"{name}.npy"}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for info, content in others.items():
            file.writestr(info, content)
        with file.open(f"{name}.npy", "w", force_zip64=True) as inner:
            inner.write(header)
            for _ in range(zeros // 2**20):
                inner.write(bytes(2**20))


def npy_header(shape: tuple[int, ...], dtype: str = "|u1", version: int = 1) -> bytes:
    text = str({"descr": dtype, "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 if version == 1 else 4, "little") + text


@pytest.mark.parametrize(
    ("name", "header", "zeros", "message"),
    [
        ("train_images", npy_header((2**34, 8, 8, 3)), 0, "says that its shape is .* but it is shorter"),
        ("train_images", npy_header((2**34, 8, 8, 3), version=2), 0, "says that its shape is"),
        ("train_images", npy_header((2**34, 8, 8, 3), version=3), 0, "version .3, 0. of NumPy's format"),
        ("train_labels", npy_header((2**40,), "<i8"), 0, "says that its shape is"),
        ("train_images", npy_header((2**20, 8, 8, 1)), 2**26, "bytes is in a file of"),
        ("train_labels", b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little"), 2**20, "EOF|too large|larger"),
    ],
)
def test_a_small_file_that_asks_for_much_memory_is_refused(tmp_path, name, header, zeros, message):
    bomb(tmp_path / "x.npz", name, header, zeros)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=f"x.npz cannot be read .*{message}"):
            load_source(str(tmp_path / "x.npz"), LoadOptions(Path()))
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("label", [10**10, 2**62, 41])
def test_one_large_label_is_refused(tmp_path, label):
    labels = np.arange(40) % 4
    labels[7] = label
    np.savez(tmp_path / "x.npz", **{**arrays(), "train_labels": labels})
    with pytest.raises(ConfigError, match="no image has label 4: number the classes from 0 without gaps"):
        load_source(str(tmp_path / "x.npz"), LoadOptions(Path()))


def test_a_large_unsigned_label_is_refused(tmp_path):
    labels = np.arange(40, dtype=np.uint64) % 4
    labels[7] = 2**64 - 1
    np.savez(tmp_path / "x.npz", **{**arrays(), "train_labels": labels})
    with pytest.raises(ConfigError, match="no image has label 4"):
        load_source(str(tmp_path / "x.npz"), LoadOptions(Path()))


def test_a_packed_idx_file_that_unpacks_to_much_is_refused(tmp_path):
    path = tmp_path / "x.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(64):
            file.write(bytes(2**20))
    with pytest.raises(ValueError, match="unpacks to more than"):
        read_idx(path)
