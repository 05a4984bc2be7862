"""A resumable stage of a run: an engine trained for some rounds, with metrics, checkpoints and a stored result."""

import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mlo import checkpoint
from mlo.errors import CheckpointError, ConfigError
from mlo.files import write_atomic
from mlo.job import Job
from mlo.progress import StageProgress
from mlo.randomness import seed_everything

if TYPE_CHECKING:
    from mlo.engine import Engine

METRICS = "metrics.jsonl"
SECONDS = "seconds.json"
KEPT = 2


class _Ended(Exception):  # noqa: N818 - it is no error
    """Raised between two rounds when a stage is to end before its last."""


class Stage:
    """One stage's folder, and the job whose seed, metrics and checkpoint intervals hold."""

    def __init__(self, path: Path, job: Job, steps: int) -> None:
        self.path, self.job, self.steps = path, job, steps

    def run(
        self,
        build: Callable[[], "Engine"],
        result: Callable[["Engine"], Any],
        stop: Callable[["Engine"], bool] | None = None,
    ) -> Any:
        """The stored result if there is one; else train what is left to train, and store it."""
        store = self.path / "result.json"
        if not store.exists():
            if self.job.threads is not None:
                torch.set_num_threads(self.job.threads)
            seed_everything(stage_seed(self.job.seed, self.path.name))
            engine = build()
            self.path.mkdir(parents=True, exist_ok=True)
            self._restore(engine)
            self._train(engine, stop or (lambda engine: False))
            write_atomic(store, self._text(result(engine)))
        return json.loads(store.read_text(encoding="utf-8"))

    def _restore(self, engine: "Engine") -> None:
        """Put the engine where the newest readable checkpoint was written."""
        for path in reversed(self._checkpoints()):
            try:
                state = checkpoint.load(path)
            except CheckpointError as error:
                print(f"note: {error}; going on without it", file=sys.stderr)
                continue
            engine.load_state_dict(state)
            return

    def _train(self, engine: "Engine", stop: Callable[["Engine"], bool]) -> None:
        metrics = Metrics(self.path / METRICS, engine.rounds)
        clock = time.process_time if engine.device.type == "cpu" else time.monotonic
        began = clock() - seconds_taken(self.path)
        with StageProgress(self.path.name, self.steps, engine.rounds) as progress, metrics, interruption() as asked:

            def after_round(engine: "Engine") -> None:
                ended = stop(engine)
                step, last = engine.rounds, ended or engine.rounds == self.steps
                progress.update(step, lambda: {name: float(loss) for name, loss in engine.losses.items()})
                if step % self.job.log_every == 0 or last:
                    metrics.write(step, engine.metrics())
                if step % self.job.checkpoint_every == 0 or last or asked():
                    metrics.sync()
                    self._save(engine)
                    write_atomic(self.path / SECONDS, f"{clock() - began:.3f}\n")
                if asked():
                    raise KeyboardInterrupt
                if ended:
                    raise _Ended

            if engine.rounds < self.steps and not (engine.rounds and stop(engine)):
                with suppress(_Ended):
                    engine.run(steps=self.steps - engine.rounds, callbacks=[after_round])
            if asked():
                raise KeyboardInterrupt

    def _save(self, engine: "Engine") -> None:
        checkpoint.save(self.path / f"step-{engine.rounds:09}.pt", engine.state_dict())
        for old in self._checkpoints()[:-KEPT]:
            old.unlink()

    def _checkpoints(self) -> list[Path]:
        return sorted(self.path.glob("step-*.pt"))

    def _text(self, result: Any) -> str:
        try:
            return json.dumps(result, indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"stage {self.path.name!r}: its result cannot be stored as JSON ({error}); "
                "return numbers that are finite, text, lists and dictionaries"
            ) from error


class Metrics:
    """One JSON object a line, step by step; lines after ``start``, written by a process that died, are cut away."""

    def __init__(self, path: Path, start: int) -> None:
        if path.exists():
            write_atomic(
                path, "".join(line for line in path.read_text().splitlines(keepends=True) if _before(line, start))
            )
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line; what is not a finite number is written as null, for JSON has no other."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Have all lines on the disk."""
        os.fsync(self._file.fileno())


def _before(line: str, start: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= start)
    except ValueError:
        return False


def seconds_taken(path: Path) -> float:
    """Seconds that the training in a stage's folder took up to its last checkpoint; see :meth:`mlo.run.Run.seconds`."""
    try:
        return float((path / SECONDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not begun, or begun by a version that kept no time
        return 0.0


def stage_seed(seed: int, name: str) -> int:
    """A seed of 32 bits of the run's seed and the stage's name, so that no stage depends on those before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Hold back the first SIGINT or SIGTERM; the function given tells whether one came. A second one interrupts."""
    came: list[int] = []

    def take(number: int, frame: Any) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)
        print("stopping after this round (once more to stop at once)", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
