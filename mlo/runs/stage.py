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
from mlo.runs.job import Job
from mlo.runs.progress import StageProgress
from mlo.training import checkpoint

if TYPE_CHECKING:
    from mlo.training.engine import Engine

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
        if not distributed.on_main(store.exists):
            if self.job.threads is not None:
                torch.set_num_threads(self.job.threads)
            seed_everything(stage_seed(self.job.seed, self.path.name))
            engine = build()
            if not distributed.is_main():  # the same weights and order of the data, but dropout of its own
                seed_everything(stage_seed(self.job.seed, f"{self.path.name}/{distributed.rank()}"))
            state = distributed.on_main(self._newest)
            if state is not None:
                engine.load_state_dict(state)
            self._train(engine, stop or (lambda engine: False))
            distributed.on_main(lambda: write_atomic(store, self._text(result(engine))))
        return distributed.on_main(lambda: json.loads(store.read_text(encoding="utf-8")))

    def _newest(self) -> dict[str, Any] | None:
        """What the newest readable checkpoint holds."""
        self.path.mkdir(parents=True, exist_ok=True)
        for path in reversed(checkpoints(self.path)):
            try:
                return checkpoint.load(path)
            except CheckpointError as error:
                print(f"note: {error}; going on without it", file=sys.stderr)
        return None

    def _train(self, engine: "Engine", stop: Callable[["Engine"], bool]) -> None:
        recorder = Recorder(self.path, self.job, self.steps, engine) if distributed.is_main() else nullcontext()
        with recorder as record, interruption() as came:

            def after_round(engine: "Engine") -> None:
                ended, asked = distributed.any_of(stop(engine)), distributed.any_of(came())
                last = ended or engine.rounds == self.steps
                if record:
                    record.note(engine, last)
                if engine.rounds % self.job.checkpoint_every == 0 or last or asked:
                    state = engine.state_dict()
                    distributed.on_main(lambda: record.save(state) if record else None)
                if asked:
                    raise KeyboardInterrupt
                if ended:
                    raise _Ended

            if engine.rounds < self.steps and not (engine.rounds and distributed.any_of(stop(engine))):
                with suppress(_Ended):
                    engine.run(steps=self.steps - engine.rounds, callbacks=[after_round])
            if distributed.any_of(came()):
                raise KeyboardInterrupt

    def _text(self, result: Any) -> str:
        try:
            return json.dumps(result, indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"stage {self.path.name!r}: its result cannot be stored as JSON ({error}); "
                "return numbers that are finite, text, lists and dictionaries"
            ) from error


class Recorder:
    """What a stage's training leaves in its folder and shows; of several processes the first one's."""

    def __init__(self, path: Path, job: Job, steps: int, engine: "Engine") -> None:
        self._path, self._job = path, job
        self._metrics = Metrics(path / METRICS, engine.rounds)
        self._progress = StageProgress(path.name, steps, engine.rounds)
        self._clock = time.process_time if engine.device.type == "cpu" else time.monotonic
        self._began = self._clock() - seconds_taken(path)

    def __enter__(self) -> "Recorder":
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._metrics.close()
        self._progress.__exit__(*error)

    def note(self, engine: "Engine", last: bool) -> None:
        """Show a round, and log it where it is its turn or the last."""
        step = engine.rounds
        self._progress.update(step, lambda: {name: float(loss) for name, loss in engine.losses.items()})
        if step % self._job.log_every == 0 or last:
            self._metrics.write(step, engine.metrics())

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a checkpoint of an engine's state, and the seconds up to it."""
        self._metrics.sync()
        checkpoint.save(self._path / f"step-{state['rounds']:09}.pt", state)
        for old in checkpoints(self._path)[:-KEPT]:
            old.unlink()
        write_atomic(self._path / SECONDS, f"{self._clock() - self._began:.3f}\n")


class Metrics:
    """One JSON object a line, step by step; lines after ``start``, written by a process that died, are cut away."""

    def __init__(self, path: Path, start: int) -> None:
        if path.exists():
            write_atomic(
                path, "".join(line for line in path.read_text().splitlines(keepends=True) if _before(line, start))
            )
        self._file = path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Write no more."""
        self._file.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line; what is not a finite number is written as null, for JSON has no other."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Have all lines on the disk."""
        os.fsync(self._file.fileno())


def checkpoints(path: Path) -> list[Path]:
    """Those in a stage's folder, the oldest first."""
    return sorted(path.glob("step-*.pt"))


def _before(line: str, start: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= start)
    except ValueError:
        return False


def seconds_taken(path: Path) -> float:
    """Seconds that the training in a stage's folder took up to its last checkpoint; see :meth:`mlo.Run.seconds`."""
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
        if distributed.is_main():
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
