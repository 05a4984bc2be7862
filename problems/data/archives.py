"""Reading arrays from .npz and IDX files, with no more memory than the size of the file warrants."""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

MOST_COMPRESSION = 100  # of images; zeros are compressed a thousand times
FREE_BYTES = 2**25  # that any file may unpack to
#: what reading a broken file raises
UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, MemoryError, SyntaxError, zipfile.BadZipFile, zlib.error)


def read_npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of these names in an .npz file.

    Raises:
        LookupError: if there are none of these names; it says which, and which there are.
        one of UNREADABLE: if it cannot be read, or would take much more memory than its size.
    """
    with zipfile.ZipFile(path) as file:
        found = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
        missing = [name for name in names if name not in found]
        if missing:
            raise LookupError(f"has no {', '.join(missing)}; it has {', '.join([*found][:20])}")
        for name in names:
            _refuse_bomb(file, found[name], path.stat().st_size)
    with np.load(path, allow_pickle=False) as arrays:
        return {name: np.asarray(arrays[name]) for name in names}


def _refuse_bomb(file: zipfile.ZipFile, info: zipfile.ZipInfo, size: int) -> None:
    """Raise a ValueError if an array says that it is much larger than the file, or than it is."""
    if info.file_size > _most(size):
        raise ValueError(f"{info.filename} of {info.file_size:,} bytes is in a file of {size:,}")
    with file.open(info) as content:
        version = np.lib.format.read_magic(content)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{info.filename} has version {version} of NumPy's format, which these arrays do not need")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(content)
    if math.prod(shape) * dtype.itemsize > info.file_size:
        raise ValueError(f"{info.filename} says that its shape is {shape}, but it is shorter")


def read_idx(path: Path) -> np.ndarray:
    """The array of bytes in an IDX file: 0, 0, 8, the rank, the sizes as big-endian int32, and the values.

    Raises:
        one of UNREADABLE: as :func:`read_npz`.
    """
    most = _most(path.stat().st_size)
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it unpacks to more than {most:,} bytes")
    rank = content[3] if content[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(content, ">i4", rank, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _most(size: int) -> int:
    """The most bytes that a file of a size may unpack to."""
    return FREE_BYTES + MOST_COMPRESSION * size
