"""What a section runs with: its device, the time it has left, and the JSON file that its results go to."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.workload import PAPER, SMOKE, Size
from mlo.files import write_atomic


class Session:
    """One run of one section.

    Args:
        section: its name.
        folder: where its results go, as "<section>.json".
        seconds: that it may take.
        smoke: whether to run at a tiny size on the CPU.

    Attributes:
        results: what was noted so far.
    """

    def __init__(self, section: str, folder: Path, seconds: float, smoke: bool) -> None:
        self.section, self.folder, self.seconds, self.smoke = section, folder, seconds, smoke
        self.results: dict[str, Any] = {"section": section, "smoke": smoke}
        self._begin = time.monotonic()

    @property
    def device(self) -> torch.device:
        """The GPU, or the CPU in smoke mode."""
        return torch.device("cpu" if self.smoke else "cuda")

    @property
    def size(self) -> Size:
        """The paper's size, or a tiny one in smoke mode."""
        return SMOKE if self.smoke else PAPER

    def left(self) -> float:
        """The seconds that are left."""
        return self.seconds - (time.monotonic() - self._begin)

    def note(self, key: str, value: Any) -> None:
        """Store a result, at once in the file, since the section may be stopped at any time; and print it."""
        self.results[key] = value
        self.write()
        print(f"[{self.section} {time.monotonic() - self._begin:5.1f} s] {key}: {value}", flush=True)

    def skip(self, what: str) -> None:
        """Note that this part cannot run without a GPU."""
        self.note(what, "skipped: needs a CUDA device")

    @contextmanager
    def attempt(self, key: str) -> Iterator[None]:
        """A context whose failure is noted under ``key``; what follows still runs."""
        try:
            yield
        except Exception:  # noqa: BLE001  one variant's failure is a result, and the others are wanted
            self.note(key, {"failed": traceback.format_exc()[-2000:]})

    @property
    def failures(self) -> list[str]:
        """The parts that failed."""
        return [key for key, value in self.results.items() if isinstance(value, dict) and value.get("failed")]

    def has_time(self, key: str, needed: float) -> bool:
        """Whether ``needed`` seconds are left; if not, this is noted under ``key``."""
        if self.left() < needed:
            self.note(key, f"skipped: {self.left():.0f} s left")
            return False
        return True

    @property
    def path(self) -> Path:
        """The file of the results."""
        return self.folder / f"{self.section}.json"

    def write(self) -> None:
        """Write the file."""
        write_atomic(self.path, json.dumps(self.results, indent=1) + "\n")

    def read(self) -> None:
        """Take over the results that another process wrote."""
        self.results = json.loads(self.path.read_text(encoding="utf-8"))

    def restart(self) -> None:
        """Count the time from now on."""
        self._begin = time.monotonic()
