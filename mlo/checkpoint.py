"""Checkpoints on disk: written whole or not at all, and loaded without executing anything."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mlo.errors import CheckpointError
from mlo.files import write_atomic


def save(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` (nested mappings and lists of tensors and plain values) to ``path``, or leave what was there.

    Raises:
        CheckpointError: if the disk does not take it.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    try:
        write_atomic(Path(path), buffer.getvalue())
    except OSError as error:
        raise CheckpointError(
            f"{path}: the checkpoint cannot be written ({error.strerror}); make room for it"
        ) from error


def load(path: str | Path) -> dict[str, Any]:
    """What :func:`save` wrote to ``path``, on the CPU.

    Raises:
        CheckpointError: if there is no such file, it is cut short, or it holds more than tensors and plain values.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such checkpoint") from error
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path}: this is no checkpoint that can be read ({reason}); use an earlier one"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: this is no checkpoint of mlo, but a {type(state).__name__}")
    return state
