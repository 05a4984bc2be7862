"""The checkpoint format: written atomically, verified when it is read, and read without executing anything in the file.

A checkpoint is a file with, one after another: a line that names the format; the length of the header, in eight bytes;
the header, which is JSON; the bytes of the tensors; and a digest of all this. The header has the sizes of the tensors'
storages, the state (:mod:`mlo.training.tree`), and the identity: which run the state belongs to. Nothing is compressed,
so the size of the file limits the memory that reading it takes.

The state of an engine (:meth:`mlo.Engine.state_dict`) has the keys "rounds", "problems" ({name:
:meth:`mlo.Problem.state_dict`}), "warm" (warm starts of estimators), "levels" (what is known about each loss, with its
float16 loss scale), "losses", "reports" (metrics), "random" and "cuda_random". After a distributed run it also has
"others": for each process but the first, the keys in ``OWN`` and its positions in the data.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mlo.errors import CheckpointError
from mlo.files import atomic
from mlo.ops import distributed
from mlo.training.tree import Reader, Writer

OWN = ("random", "cuda_random", "levels")  # the keys of an engine's state that differ between processes
FORMAT = b"mlo checkpoint, format 1\n"
EARLIER = "; use an earlier one"
DIGEST_SIZE = 32
MOST_HEADER = 2**28  # bytes
VALUE_MEMORY = 128  # bytes that a value in a header may take in memory
FREE_MEMORY = 2**26  # bytes that the values of a small file may take in memory


class OtherRunError(CheckpointError):
    """A checkpoint is good, but of another run, stage, seed, configuration or round."""


def save(path: str | Path, state: Mapping[str, Any], identity: Mapping[str, Any] | None = None) -> None:
    """Write ``state`` to ``path``. If that fails, an existing file is left unchanged.

    Args:
        path: the file to write; its folder must exist.
        state: nested mappings and lists of tensors and plain values.
        identity: {what: plain value}, which :func:`load` can ask for: the run, the stage, ...

    Raises:
        CheckpointError: if the file cannot be written, or cannot hold a part of the state.
    """
    writer = Writer()
    try:
        parts = {"identity": writer.value(dict(identity or {})), "state": writer.value(dict(state))}
        writer.finish()
        sizes = [storage.numel() for storage in writer.storages]
        header = json.dumps({"storages": sizes, **parts}, allow_nan=False, separators=(",", ":")).encode()
    except RecursionError as error:
        raise CheckpointError(f"{path}: the state is nested too deeply, or contains itself; flatten it") from error
    if not _affordable(header, len(header) + sum(sizes)):
        raise CheckpointError(
            f"{path}: the state holds about {header.count(b',')} plain values; keep long lists of numbers as tensors"
        )
    try:
        with atomic(Path(path)) as file:
            _write(file, header, writer.storages)
    except OSError as error:
        raise CheckpointError(
            f"{path}: the checkpoint cannot be written ({error.strerror}); choose an existing folder with free space"
        ) from error


def load(path: str | Path, identity: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read what :func:`save` wrote to ``path``; tensors are on the CPU.

    Args:
        path: the file.
        identity: what the file's identity must contain.

    Raises:
        CheckpointError: if the file does not exist, is damaged, or has another identity.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: this is not a file; give the path of a checkpoint")
    try:
        with path.open("rb") as file:
            found = _read(file, os.fstat(file.fileno()).st_size)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: this checkpoint does not exist; check the path") from error
    # RuntimeError: torch has no memory, or refuses a tensor
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, MemoryError, OverflowError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path}: this file is not a readable checkpoint ({reason}){EARLIER}") from error
    for what, expected in (identity or {}).items():
        given = found["identity"].get(what)
        if given != expected:
            raise OtherRunError(f"{path}: this checkpoint is of another {what}: {given!r}, and not {expected!r}")
    state: dict[str, Any] = found["state"]
    return state


def _write(file: BinaryIO, header: bytes, storages: list[Tensor]) -> None:
    digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
    for part in (FORMAT, len(header).to_bytes(8, "little"), header):
        file.write(part)
        digest.update(part)
    for storage in storages:
        content = storage.cpu().numpy().data
        file.write(content)
        digest.update(content)
    file.write(digest.digest())


def _read(file: BufferedReader, size: int) -> dict[str, Any]:
    """The identity and the state in a file of this size. Nothing of it is used before the digest is verified."""
    digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
    start = file.read(len(FORMAT) + 8)
    if not start.startswith(FORMAT):
        raise ValueError(_other_format(start))
    length, left = int.from_bytes(start[len(FORMAT) :], "little"), size - len(start) - DIGEST_SIZE
    if not 0 <= length <= min(left, MOST_HEADER):
        raise ValueError("it is damaged: it ends too early")
    header = file.read(length)
    if not _affordable(header, size):
        raise ValueError(f"it would take more memory than its {size} bytes warrant")
    for part in (start, header):
        digest.update(part)
    content = json.loads(header)
    sizes = content["storages"]
    if any(type(bytes_) is not int or bytes_ < 1 for bytes_ in sizes) or sum(sizes) != left - length:
        raise ValueError("it is damaged: its length is not that of its tensors")
    storages = []
    for bytes_ in sizes:
        storage = torch.empty(bytes_, dtype=torch.uint8)
        if file.readinto(storage.numpy().data) != bytes_:
            raise ValueError("it is damaged: it ends too early")
        digest.update(storage.numpy().data)
        storages.append(storage)
    if file.read() != digest.digest():
        raise ValueError("it is damaged: its content does not match its digest")
    reader = Reader(storages)
    found = {part: reader.value(content[part]) for part in ("identity", "state")}
    if not all(isinstance(part, dict) for part in found.values()):
        raise ValueError("it holds no state")
    return found


def _affordable(header: bytes, size: int) -> bool:
    """Whether the values in a header take an amount of memory that is in proportion to the size of the file."""
    return header.count(b",") * VALUE_MEMORY <= FREE_MEMORY + 8 * size


def _other_format(start: bytes) -> str:
    if start.startswith(b"PK"):
        return (
            "torch.save wrote it, as mlo once did, without a digest. If you trust it, convert it: "
            "mlo.checkpoint.save(NEW, torch.load(OLD, weights_only=True))"
        )
    return "mlo did not write it, or its beginning is damaged"


def with_other_processes(state: dict[str, Any]) -> dict[str, Any]:
    """The engine's state in the first process, with the parts of the other processes; returned in all processes."""
    if distributed.world() == 1:
        return state
    own = {key: state[key] for key in OWN} | {"data": {n: part["data"] for n, part in state["problems"].items()}}
    first, *others = distributed.gathered(own)
    return {**_with(state, first), "others": others}


def of_this_process(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state for this process, from what :func:`with_other_processes` returned.

    Raises:
        CheckpointError: if it was saved by a different number of processes.
    """
    others = state.get("others", ())
    then, now = 1 + len(others), distributed.world()
    if then != now:
        raise CheckpointError(
            f"the checkpoint was saved in {then} process(es), and {now} cannot continue from its random states; "
            f"start {then} ({f'torchrun --nproc-per-node {then}' if then > 1 else 'without torchrun'})"
        )
    if distributed.is_main():
        return state
    return _with(state, others[distributed.rank() - 1])


def _with(state: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The state, with the parts of one process."""
    problems = {name: {**part, "data": own["data"][name]} for name, part in state["problems"].items()}
    return {**state, **{key: own[key] for key in OWN}, "problems": problems}
