"""Writing a file so that it is there whole or not at all."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+\.tmp")  # the name of the file, and the number of the process


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which replaces ``path`` at the end, flushed to the disk.

    It is a temporary file in the same folder until then. So a crash at any moment, and an error in the context, leave
    either the old file or the new one.

    Raises:
        OSError: if it cannot be written; the old file stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # the name that the caller knows
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()
    if hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder, and needs no flush of it
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file with :func:`atomic`.

    Raises:
        OSError: if it cannot be written; the old file stays.
    """
    with atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def remove_temporary(folder: Path) -> None:
    """Remove what killed processes left of files that they wrote in a folder and in those below it.

    No process may be writing there.
    """
    for inside, _, names in os.walk(folder):
        for name in names:
            if TEMPORARY.fullmatch(name):
                Path(inside, name).unlink(missing_ok=True)
