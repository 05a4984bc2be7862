"""Where data sets are on the disk, and whether two sources are the same files. Does not import torch."""

from __future__ import annotations

import os
from pathlib import Path

CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}  # torchvision's names


def data_root(given: str | None) -> Path:
    """The folder that holds data sets: the given one, or $MLO_DATA, or ~/.cache/mlo/data."""
    return Path(given or os.environ.get("MLO_DATA") or "~/.cache/mlo/data").expanduser()


def read_from(name: str, root: Path) -> str:
    """The file or folder that holds a source's labeled images; the same text however its path is written."""
    if name in ("digits", "fashion_mnist"):
        return name
    path = Path(name).expanduser()
    if name in CIFAR_FOLDERS:
        folder = root / CIFAR_FOLDERS[name]
        path = folder if folder.is_dir() else root / f"{name}.npz"
    elif name == "imagenet":
        path = root / name
    return str((path / "train" if path.is_dir() else path).resolve())
