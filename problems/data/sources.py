"""Sources of images: digits, data sets by name, .npz files, and folders of image files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torchvision import datasets
from torchvision.transforms import v2

from mlo import ConfigError
from mlo.options import registry
from problems.data.archives import UNREADABLE, read_idx, read_npz
from problems.data.images import ArrayPixels, FilePixels, Part, Pixels
from problems.data.locations import CIFAR_FOLDERS

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FOLDER_IMAGE_SIZE = 224
CIFAR: dict[str, Any] = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}


class Source(NamedTuple):
    """The labeled images of a source, and its test images if it has a test set."""

    labeled: Part
    test: Part | None


class LoadOptions(NamedTuple):
    """Where to look for a source, and how to read it.

    Attributes:
        root: the folder that holds the data sets.
        download: whether torchvision may download a data set that is missing.
        image_size: images are resized to this side, in pixels; None: not resized (image files: 224).
        device: of the run; None: the CPU. Images from arrays are stored there if they fit.
        workers: processes that load image files.
        named_by: the option that gives the source's name, for messages.
    """

    root: Path
    download: bool = False
    image_size: int | None = None
    device: torch.device | None = None
    workers: int = 0
    named_by: str = "data.source"


def load_source(name: str, options: LoadOptions) -> Source:
    """The images of a source.

    Args:
        name: "digits", "cifar10", "cifar100", "fashion_mnist", "imagenet", the path of an .npz file with train_images
            (N, H, W, C) of uint8, train_labels (N,), test_images and test_labels, or the path of a folder with train/
            and test/ (or, without it, val/), each with a folder of image files for each class.
        options: where to look, and how to read.

    Raises:
        ConfigError: if the source is missing or does not have the form described above.
    """
    if name in NAMED:
        return NAMED[name](options)
    path = Path(name).expanduser()
    if path.is_dir():
        return _folders(path, options)
    if path.suffix == ".npz" and path.is_file():
        return _npz(path, options)
    guess = registry.nearest(name, NAMED)
    raise ConfigError(
        f"{options.named_by}: {name!r} does not exist; {f'did you mean {guess}? ' if guess else ''}"
        f"give {', '.join(NAMED)}, or the path of an .npz file with images and labels or of a "
        "folder with train/ and test/"
    )


def _digits(options: LoadOptions) -> Source:
    """Scikit-learn's 1,797 labeled images of 1x8x8; there is no test set."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    return Source(_in_memory(images, torch.from_numpy(digits.target), options), None)


def _npz(path: Path, options: LoadOptions) -> Source:
    try:
        arrays = read_npz(path, ARRAYS)
    except LookupError as error:
        raise ConfigError(f"{options.named_by}: {path} {error}") from error
    except UNREADABLE as error:
        raise ConfigError(
            f"{options.named_by}: {path} cannot be read ({error}); write it with numpy.savez and {', '.join(ARRAYS)}; "
            "images are uint8 of shape (N, H, W, C), labels are integers of shape (N,)"
        ) from error
    return _from_arrays(arrays, str(path), options)


def _from_arrays(arrays: dict[str, np.ndarray], where: str, options: LoadOptions) -> Source:
    """The source made from the arrays of an .npz file; messages name ``where`` they come from."""
    faults = [fault for part in ("train", "test") for fault in _faults(arrays, part)]
    train, test = arrays["train_labels"], arrays["test_labels"]
    if not faults:
        shapes = [arrays[f"{part}_images"].shape[1:] for part in ("train", "test")]
        if shapes[0] != shapes[1]:
            faults.append(
                f"test_images have (H, W, C) = {shapes[1]}, and train_images {shapes[0]}: give both the same shape"
            )
        present = np.unique(train)
        gaps = np.flatnonzero(present != np.arange(len(present)))
        if len(gaps):
            faults.append(f"no image has label {gaps[0]}: number the classes from 0 without gaps")
        strange = sorted(set(test.tolist()) - set(train.tolist()))
        if strange:
            faults.append(f"test_labels contain {strange[0]}, which train_labels do not: remove these images")
    if faults:
        raise ConfigError("\n  ".join([f"{options.named_by}: {where} cannot be used", *faults]))
    parts = []
    for part in ("train", "test"):
        images = torch.from_numpy(np.array(arrays[f"{part}_images"].transpose(0, 3, 1, 2), order="C"))
        parts.append(_in_memory(images, torch.from_numpy(arrays[f"{part}_labels"].astype(np.int64)), options))
    return Source(*parts)


def _faults(arrays: dict[str, np.ndarray], part: str) -> list[str]:
    """What is wrong with the arrays of one part, and what to change."""
    images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
    found = []
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape[1:]:
        found.append(f"{part}_images are {images.dtype} of shape {images.shape}: use uint8 of shape (N, H, W, C)")
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        found.append(f"{part}_labels are {labels.dtype} of shape {labels.shape}: use integers of shape (N,)")
    elif images.ndim and (len(labels) != len(images) or not len(labels)):
        found.append(
            f"there are {len(labels)} {part}_labels for {len(images)} {part}_images: give one label for each image"
        )
    elif labels.size and labels.min() < 0:
        found.append(f"{part}_labels contain {labels.min()}: number the classes from 0")
    return found


def _in_memory(images: torch.Tensor, labels: torch.Tensor, options: LoadOptions) -> Part:
    """A part with images (N, C, H, W) in memory, resized once, with antialiasing, if ``options`` have a size.

    They are stored on the device, unless it is a GPU and they take more than a quarter of its memory.
    """
    size = options.image_size
    if size is not None and images.shape[2:] != (size, size):
        images = torch.cat([v2.functional.resize(some, [size, size], antialias=True) for some in images.split(1000)])
    device = options.device or torch.device("cpu")
    if device.type == "cuda" and images.nbytes > torch.cuda.get_device_properties(device).total_memory / 4:
        device = torch.device("cpu")
    return _part(ArrayPixels(images.to(device)), labels, options)


def _folders(path: Path, options: LoadOptions) -> Source:
    test = next((path / name for name in ("test", "val") if (path / name).is_dir()), None)
    if test is None or not (path / "train").is_dir():
        raise ConfigError(
            f"{options.named_by}: {path} should contain train/ and test/ (or val/), each with a folder of image files "
            f"for each class; it contains {', '.join(sorted(os.listdir(path))[:8]) or 'nothing'}"
        )
    try:
        found = [datasets.ImageFolder(folder) for folder in (path / "train", test)]
    except FileNotFoundError as error:
        raise ConfigError(
            f"{options.named_by}: {path} should contain train/ and {test.name}/, each with a folder of image files "
            f"for each class: {error}"
        ) from error
    other = set(found[0].classes) ^ set(found[1].classes)
    if other:
        raise ConfigError(
            f"{options.named_by}: the class folders {', '.join(sorted(other)[:5])} "
            f"{'is' if len(other) == 1 else 'are'} in only one of {path}/train and {test}; both need the same classes"
        )
    return Source(*(_in_files(images, options) for images in found))


def _in_files(images: datasets.ImageFolder, options: LoadOptions) -> Part:
    pixels = FilePixels([path for path, _ in images.samples], options.image_size or FOLDER_IMAGE_SIZE)
    return _part(pixels, torch.tensor(images.targets), options, options.workers)


def _part(pixels: Pixels, labels: torch.Tensor, options: LoadOptions, workers: int = 0) -> Part:
    """All of ``pixels``, not normalized. Batches that the CPU makes for a GPU are loaded into pinned memory."""
    for_gpu = options.device is not None and options.device.type == "cuda"
    return Part.of(pixels, labels, workers, pin_memory=for_gpu and pixels.device.type == "cpu")


def _imagenet(options: LoadOptions) -> Source:
    root = options.root / "imagenet"
    try:
        found = [datasets.ImageNet(root, split) for split in ("train", "val")]
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"{options.named_by}: ImageNet was not found in {root} ({error}). Put the archives "
            "ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar there, or set "
            f"data.root to the folder that contains imagenet/. If the images are already in folders train/ and val/, "
            f"give the path of the folder that contains these two as {options.named_by}"
        ) from error
    return Source(*(_in_files(images, options) for images in found))


def _cifar(name: str, options: LoadOptions) -> Source:
    """CIFAR, from torchvision's files, from ``name``.npz, or downloaded, in this order."""
    kind = CIFAR[name]
    folder, file = options.root / CIFAR_FOLDERS[name], options.root / f"{name}.npz"
    if not folder.is_dir() and file.is_file():
        return _npz(file, options)
    if not folder.is_dir() and not options.download:
        raise _absent(options, name, f"{folder} and {file}")
    parts = _torchvision(options, name, lambda train: kind(options.root, train=train, download=options.download))
    return _from_arrays(
        {
            f"{part}_{what}": np.asarray(values)
            for part, data in zip(("train", "test"), parts, strict=True)
            for what, values in (("images", data.data), ("labels", data.targets))
        },
        str(folder),
        options,
    )


def _torchvision(options: LoadOptions, name: str, load: Callable[[bool], Any]) -> list[Any]:
    """Training and test set from torchvision; its errors are raised as ConfigError."""
    try:
        return [load(train) for train in (True, False)]
    except (RuntimeError, OSError, EOFError) as error:
        raise ConfigError(
            f"{options.named_by}: torchvision cannot load {name} from {options.root} ({error}); remove the broken "
            "files and write data.download: true, or set data.root to a folder that has good ones"
        ) from error


def _absent(options: LoadOptions, name: str, looked: str) -> ConfigError:
    data = {**CIFAR, "fashion_mnist": datasets.FashionMNIST}[name].__name__
    return ConfigError(
        f"{options.named_by}: {name} was not found in {looked}; download it with `python -c "
        f"\"from torchvision.datasets import {data}; {data}('{options.root}', download=True)\"` (in a run, "
        "data.download: true does the same), or set the environment variable MLO_DATA or data.root to the folder that "
        "contains it"
    )


def _fashion_mnist(options: LoadOptions) -> Source:
    """Fashion-MNIST, from torchvision's files, from Debian's package, or downloaded, in this order."""
    raw = options.root / "FashionMNIST" / "raw"
    folder = next((f for f in (raw, DEBIAN_FASHION_MNIST) if _idx(f, "train-images-idx3-ubyte")), None)
    if folder is None and options.download:
        _torchvision(options, "fashion_mnist", lambda train: datasets.FashionMNIST(options.root, train, download=True))
        folder = raw
    if folder is None:
        raise _absent(options, "fashion_mnist", f"{raw} and {DEBIAN_FASHION_MNIST}")
    arrays = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        arrays[f"{part}_images"] = _read_idx(folder, f"{prefix}-images-idx3-ubyte", options)[..., None]
        arrays[f"{part}_labels"] = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", options)
    return _from_arrays(arrays, str(folder), options)


def _idx(folder: Path, name: str) -> Path | None:
    """The file with this name, compressed or not, or None."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_idx(folder: Path, name: str, options: LoadOptions) -> np.ndarray:
    path = _idx(folder, name)
    try:
        if path is None:
            raise OSError(f"no {name} or {name}.gz")
        return read_idx(path)
    except UNREADABLE as error:
        raise ConfigError(
            f"{options.named_by}: fashion_mnist cannot be read from {path or folder} ({error}); replace the four "
            "files of Fashion-MNIST there"
        ) from error


NAMED: dict[str, Callable[[LoadOptions], Source]] = {
    "digits": _digits,
    "cifar10": lambda options: _cifar("cifar10", options),
    "cifar100": lambda options: _cifar("cifar100", options),
    "fashion_mnist": _fashion_mnist,
    "imagenet": _imagenet,
}
