"""Text files with a digest beside them, so that damage is found when they are read."""

import hashlib
from pathlib import Path

from mlo.files import write_atomic


def write_sealed(path: Path, text: str) -> None:
    """Write a file, and its digest to a second file, in the form that `sha256sum -c` reads.

    A crash between the two leaves a digest without a file, and no file without a digest.

    Raises:
        OSError: if one cannot be written.
    """
    path.unlink(missing_ok=True)  # the digest of the new file is not that of the old one
    write_atomic(_seal(path), f"{_digest(text.encode())}  {path.name}\n")
    write_atomic(path, text)


def read_sealed(path: Path) -> str:
    """The text of a file, verified if its digest is there.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is damaged.
    """
    content, seal = path.read_bytes(), _seal(path)
    if seal.exists() and seal.read_bytes().partition(b" ")[0] != _digest(content).encode():
        raise ValueError(f"its content does not match {seal.name}")
    return content.decode()


def _seal(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
