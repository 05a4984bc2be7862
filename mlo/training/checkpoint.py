"""Checkpoints on disk: written whole or not at all, and loaded without executing anything."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mlo.errors import CheckpointError
from mlo.files import write_atomic
from mlo.ops import distributed

OWN = ("random", "cuda_random", "scales")  # of an engine's state, what each of several processes has for itself


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
            f"{path}: the checkpoint cannot be written ({error.strerror}); give it a folder that is there and has room"
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
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(
            f"{path}: this is no checkpoint that can be read ({reason}); use an earlier one"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: this is no checkpoint of mlo, but a {type(state).__name__}")
    return state


def with_other_processes(state: dict[str, Any]) -> dict[str, Any]:
    """An engine's state in the first process, with what the others that train with it have of their own; in all."""
    if distributed.world() == 1:
        return state
    own = {key: state[key] for key in OWN} | {"data": {n: part["data"] for n, part in state["problems"].items()}}
    first, *others = distributed.gathered(own)
    return {**_with(state, first), "others": others}


def of_this_process(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state of this process in what :func:`with_other_processes` returned.

    Raises:
        CheckpointError: if it is of more or fewer processes than there are.
    """
    others = state.get("others", ())
    then, now = 1 + len(others), distributed.world()
    if then != now:
        raise CheckpointError(
            f"the checkpoint is of a training in {then} process(es), and {now} cannot go on with its random draws; "
            f"start {then} ({f'torchrun --nproc-per-node {then}' if then > 1 else 'without torchrun'})"
        )
    if distributed.is_main():
        return state
    return _with(state, others[distributed.rank() - 1])


def _with(state: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The state with what one process has of its own."""
    problems = {name: {**part, "data": own["data"][name]} for name, part in state["problems"].items()}
    return {**state, **{key: own[key] for key in OWN}, "problems": problems}
