"""Section `waits`: where a round waits for the device, by torch's own warnings."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.gpu.session import Session
from benchmarks.gpu.timing import synchronize
from benchmarks.gpu.workload import search_engine

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 3
FOLDERS = ("mlo", "problems")


def measure(session: Session) -> None:
    """The number of waits in a round, and the lines that wait."""
    engine = search_engine(session.size, session.device)
    engine.step()
    synchronize(session.device)
    with noted_waits(session.device) as where:
        for _ in range(1 if session.smoke else ROUNDS):
            engine.step()
    if session.device.type != "cuda":
        session.skip("waits_a_round")
        return
    session.note("waits_a_round", round(where.total() / ROUNDS, 1))
    session.note("lines", dict(where.most_common(40)))


@contextmanager
def noted_waits(device: torch.device) -> Iterator[Counter[str]]:
    """A context whose value counts the waits in it, {the three innermost lines of mlo and problems: count}."""
    where: Counter[str] = Counter()

    def show(message: Warning | str, *_: object) -> None:
        if "synchroniz" in str(message).lower():
            where[_lines()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show  # catch_warnings puts the other back
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield where
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def _lines() -> str:
    frames = [
        f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}"
        for frame in traceback.extract_stack()
        if any(Path(frame.filename).is_relative_to(ROOT / folder) for folder in FOLDERS)
    ]
    return " < ".join(frames[:-4:-1])
