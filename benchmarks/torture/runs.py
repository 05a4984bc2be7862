"""Small runs to attack, and whether two of them ended in the same way."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch

from benchmarks.torture.commands import run_command
from mlo import Experiment, Wanted, checkpoint
from mlo.files import TEMPORARY

OPTIONS: dict[str, Any] = {
    "steps": 3,
    "log_every": 1,
    "checkpoint_every": 1,
    "keep": {"last": 2, "best": 1, "by": "arch/loss"},
    "methods": ["lbt"],
    "page": False,
    "search": {"channels": 1, "cells": 3, "batch_size": 4, "operations": ["skip_connect", "avg_pool_3x3"]},
    "evaluation": {"steps": 3, "channels": 1, "cells": 1, "batch_size": 4},
    "data": {"train_size": 10, "validation_size": 10, "unlabeled_size": 10, "test_size": 20},
    "device": "cpu",
}
SAME_BYTES = ("config.yaml", "metrics.jsonl", "result.json", "scores.json", "genotype.json", "genotype-plain.json")


class Tiny(Experiment):
    """An experiment with two small runs."""

    scales: ClassVar[Mapping[str, int]] = {"tiny": 1}

    def runs(self, scale: str) -> Mapping[str, Wanted]:
        """Two weights of the student."""
        return {f"weight-{weight}": Wanted("lbt", {**OPTIONS, "student_weight": weight}) for weight in (0.5, 1.0)}

    def write(self, scale: str, results: Mapping[str, Mapping[int, Any]], folder: Path) -> list[Path]:
        """A page with the errors."""
        page = folder / "tiny.md"
        page.write_text(str({key: rows[0]["lbt"]["test_error"] for key, rows in results.items()}))
        return [page]


def words_of(options: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Options as words of a command line."""
    words = []
    for name, value in options.items():
        if isinstance(value, Mapping):
            words += words_of(value, f"{prefix}{name}.")
        else:
            words.append(f"--{prefix}{name}={json.dumps(value) if not isinstance(value, str) else value}")
    return words


def chance(seed: int, *names: object) -> random.Random:
    """Random numbers of one trial."""
    return random.Random(repr((seed, *names)))


def finished_run(folder: Path, *more: str) -> Path:
    """A run that nothing attacked, in a new folder."""
    ended = run_command(
        ["run", "lbt", *words_of(OPTIONS), *more, "--output", str(folder)], folder, folder.with_suffix(".log")
    )
    assert ended.code == 0, ended.output
    return folder


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is removed afterwards; in memory where that is possible, as these files are written often."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="torture-", dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def differences(found: Path, expected: Path, damaged: Path | None = None) -> list[str]:
    """How the runs below a folder differ from those below another one in what they ended with.

    A file that was ``damaged`` is not compared: nothing may have needed it.
    """
    names = [{str(file.parent.relative_to(top)) for file in top.rglob("run.json")} for top in (found, expected)]
    wrong = [f"there are the runs {names[0]}, and not {names[1]}"] if names[0] != names[1] else []
    for name in sorted(names[0] & names[1]):
        wrong += [f"{name}: {what}" for what in _run_differences(found / name, expected / name, damaged)]
    return wrong + [f"{file}: was left" for file in found.rglob("*") if TEMPORARY.fullmatch(file.name)]


def _run_differences(found: Path, expected: Path, damaged: Path | None) -> Iterator[str]:
    files = [
        {str(file.relative_to(top)): file for file in top.rglob("*") if file.is_file()} for top in (found, expected)
    ]
    for name, file in files[1].items():
        if name not in files[0]:
            yield f"{name} is missing"
        elif files[0][name] == damaged:
            continue
        elif file.name in SAME_BYTES and files[0][name].read_bytes() != file.read_bytes():
            yield f"{name} has other content"
        elif file.suffix == ".pt" and not same(checkpoint.load(files[0][name]), checkpoint.load(file)):
            yield f"{name} holds another state"
        elif file.name == "results.json" and not same(*(_without_seconds(each) for each in (files[0][name], file))):
            yield f"{name} has other numbers"
    for name in files[0].keys() - files[1].keys():
        if not TEMPORARY.fullmatch(Path(name).name) and Path(name).suffix != ".pt":
            yield f"{name} is not one of an unbroken run"


def _without_seconds(file: Path) -> Any:
    rows = json.loads(file.read_text())
    return {row: {k: v for k, v in measures.items() if not k.endswith("seconds")} for row, measures in rows.items()}


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal to the last bit, and of the same kinds."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        kinds = [(t.dtype, t.shape, t.requires_grad) for t in (one, other)]
        return kinds[0] == kinds[1] and torch.equal(_bits(one), _bits(other))
    return repr(one) == repr(other)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor; NaN equals itself."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor.detach()
