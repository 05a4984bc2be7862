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
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mlo.errors import CheckpointError, ConfigError
from mlo.files import write_atomic
from mlo.ops import distributed
from mlo.ops.rng import seed_everything
from mlo.runs.progress import StageProgress
from mlo.runs.settings import RunSettings
from mlo.training import checkpoint

if TYPE_CHECKING:
    from mlo.training.engine import Engine

METRICS = "metrics.jsonl"
SECONDS = "seconds.json"
KEPT = 2


class _StageEnded(Exception):  # noqa: N818 - it is no error
    """Raised between two rounds to end a stage before its last round."""


class Stage:
    """A stage's folder, number of rounds and settings: seed, threads and intervals."""

    def __init__(self, path: Path, settings: RunSettings, steps: int) -> None:
        self.path, self.settings, self.steps = path, settings, steps

    def run(
        self,
        build: Callable[[], "Engine"],
        result: Callable[["Engine"], Any],
        stop: Callable[["Engine"], bool] | None = None,
    ) -> Any:
        """Return the stored result if there is one; else train the remaining rounds and store the result."""
        store = self.path / "result.json"
        if not distributed.on_main(store.exists):
            if self.settings.threads is not None:
                torch.set_num_threads(self.settings.threads)
            seed_everything(stage_seed(self.settings.seed, self.path.name))
            engine = build()
            if not distributed.is_main():  # same weights and data order, different dropout
                seed_everything(stage_seed(self.settings.seed, f"{self.path.name}/{distributed.rank()}"))
            state = distributed.on_main(self._newest)
            if state is not None:
                engine.load_state_dict(state)
            self._train(engine, stop or (lambda engine: False))
            distributed.on_main(lambda: write_atomic(store, self._text(result(engine))))
        return distributed.on_main(lambda: json.loads(store.read_text(encoding="utf-8")))

    def _newest(self) -> dict[str, Any] | None:
        """The state in the newest readable checkpoint."""
        self.path.mkdir(parents=True, exist_ok=True)
        for path in reversed(checkpoints(self.path)):
            try:
                return checkpoint.load(path)
            except CheckpointError as error:
                print(f"note: {error}; continuing without it", file=sys.stderr)
        return None

    def _train(self, engine: "Engine", stop: Callable[["Engine"], bool]) -> None:
        recorder = Recorder(self.path, self.settings, self.steps, engine) if distributed.is_main() else nullcontext()
        with recorder as record, interruption() as interrupted:

            def after_round(engine: "Engine") -> None:
                ended, stopped = distributed.any_of(stop(engine)), distributed.any_of(interrupted())
                last = ended or engine.rounds == self.steps
                if record:
                    record.log(engine, last)
                if engine.rounds % self.settings.checkpoint_every == 0 or last or stopped:
                    state = engine.state_dict()
                    distributed.on_main(lambda: record.save(state) if record else None)
                if stopped:
                    raise KeyboardInterrupt
                if ended:
                    raise _StageEnded

            if engine.rounds < self.steps and not (engine.rounds and distributed.any_of(stop(engine))):
                with suppress(_StageEnded):
                    engine.run(steps=self.steps - engine.rounds, callbacks=[after_round])
            if distributed.any_of(interrupted()):
                raise KeyboardInterrupt

    def _text(self, result: Any) -> str:
        try:
            return json.dumps(result, indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"stage {self.path.name!r}: its result cannot be stored as JSON ({error}); "
                "return finite numbers, text, lists and dictionaries"
            ) from error


class Recorder:
    """Writes a stage's metrics and checkpoints and shows its progress; with several processes, in the first only."""

    def __init__(self, path: Path, settings: RunSettings, steps: int, engine: "Engine") -> None:
        self._path, self._log_every = path, settings.log_every
        self._metrics = Metrics(path / METRICS, engine.rounds)
        self._progress = StageProgress(path.name, steps, engine.rounds)
        self._clock = time.process_time if engine.device.type == "cpu" else time.monotonic
        self._started = self._clock() - training_seconds(path)

    def __enter__(self) -> "Recorder":
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._metrics.close()
        self._progress.__exit__(*error)

    def log(self, engine: "Engine", last: bool) -> None:
        """Show a round, and log its metrics every ``log_every`` rounds and in the last one."""
        step = engine.rounds
        self._progress.update(step, lambda: {name: float(loss) for name, loss in engine.losses.items()})
        if step % self._log_every == 0 or last:
            self._metrics.write(step, engine.metrics())

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a checkpoint of an engine's state, and the seconds trained up to it."""
        self._metrics.sync()
        checkpoint.save(self._path / f"step-{state['rounds']:09}.pt", state)
        for old in checkpoints(self._path)[:-KEPT]:
            old.unlink()
        write_atomic(self._path / SECONDS, f"{self._clock() - self._started:.3f}\n")


class Metrics:
    """A file with one JSON object per line. Lines after step ``start``, which a killed process wrote, are removed."""

    def __init__(self, path: Path, start: int) -> None:
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            write_atomic(path, "".join(line for line in lines if _up_to(line, start)))
        self._file = path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line. NaN and infinity are written as null, since JSON has neither."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Flush all lines to the disk."""
        os.fsync(self._file.fileno())


def checkpoints(path: Path) -> list[Path]:
    """The checkpoints in a stage's folder, oldest first."""
    return sorted(path.glob("step-*.pt"))


def _up_to(line: str, start: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= start)
    except ValueError:
        return False


def training_seconds(path: Path) -> float:
    """Seconds that a stage had trained at its last checkpoint; see :meth:`mlo.Run.seconds`."""
    try:
        return float((path / SECONDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not started, or started by a version that did not measure
        return 0.0


def stage_seed(seed: int, name: str) -> int:
    """A 32-bit seed made of the run's seed and the stage's name, so that no stage depends on earlier ones."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Hold back the first SIGINT or SIGTERM; yields a function that returns whether one came.

    A second signal raises KeyboardInterrupt at once. Outside the main thread, where Python handles no signals, nothing
    is held back.
    """
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        if distributed.is_main():
            print("stopping after this round (once more to stop at once)", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
