"""The checkpoint format: written atomically, and loaded without executing any code from the file.

A checkpoint is a file of ``torch.save`` with nested dictionaries and lists of tensors and plain values. The state of an
engine (:meth:`mlo.Engine.state_dict`) has the keys "rounds", "problems" ({name: :meth:`mlo.Problem.state_dict`}),
"warm" (warm starts of estimators), "levels" (what is known about each loss, with its float16 loss scale), "losses",
"reports" (metrics), "random" and "cuda_random". After a distributed run it also has "others": for each
process but the first, the keys in ``OWN`` and its positions in the data.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mlo.errors import CheckpointError
from mlo.files import write_atomic
from mlo.ops import distributed

OWN = ("random", "cuda_random", "levels")  # the keys of an engine's state that differ between processes


def save(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` to ``path``. If that fails, an existing file is left unchanged.

    Args:
        path: the file to write; its folder must exist.
        state: nested mappings and lists of tensors and plain values.

    Raises:
        CheckpointError: if the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    try:
        write_atomic(Path(path), buffer.getvalue())
    except OSError as error:
        raise CheckpointError(
            f"{path}: the checkpoint cannot be written ({error.strerror}); choose an existing folder with free space"
        ) from error


def load(path: str | Path) -> dict[str, Any]:
    """Read what :func:`save` wrote to ``path``; tensors are on the CPU.

    Raises:
        CheckpointError: if the file does not exist, is incomplete, or contains more than tensors and plain values.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: this checkpoint does not exist; check the path") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(
            f"{path}: this file is not a readable checkpoint ({reason}); use an earlier one"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path}: this is not a checkpoint of mlo, but a {type(state).__name__}; use one that mlo wrote"
        )
    return state


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
