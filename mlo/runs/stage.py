"""A resumable stage of a run: an engine trained for some rounds, with metrics, checkpoints and a stored result."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mlo.errors import ConfigError
from mlo.files import write_atomic
from mlo.ops import distributed
from mlo.ops.rng import derived_seed, seed_everything, seeded
from mlo.runs.checkpoints import Checkpoints
from mlo.runs.job import Job
from mlo.runs.metrics import cut_metrics, is_logged
from mlo.runs.progress import stage_progress
from mlo.runs.sealed import read_sealed, write_sealed
from mlo.runs.signals import handle_stop_signals

if TYPE_CHECKING:
    from mlo.training.engine import Engine

SECONDS = "seconds.json"
HEARTBEAT = "heartbeat"
HEARTBEAT_SECONDS = 5.0


def run_stage(
    path: Path,
    job: Job,
    identity: Mapping[str, Any],
    steps: int,
    build: Callable[[], "Engine"],
    result: Callable[["Engine"], Any],
    stop: Callable[["Engine"], bool] | None = None,
) -> Any:
    """Return the stored result of the stage in a folder if there is one; else train the remaining rounds and store it.

    ``identity`` says which run and stage a checkpoint belongs to. The other arguments are those of
    :meth:`mlo.Run.stage`.
    """
    store, checkpoints = path / "result.json", Checkpoints(path, identity, job.keep)
    if not distributed.on_main(store.exists):
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        with seeded(derived_seed(job.seed, path.name)):
            engine = build()
            if not distributed.is_main():  # same weights and data order, different dropout
                seed_everything(derived_seed(job.seed, f"{path.name}/{distributed.rank()}"))
            distributed.on_main(lambda: path.mkdir(parents=True, exist_ok=True))
            state = distributed.on_main(lambda: checkpoints.newest())
            if state is not None:
                engine.load_state_dict(state)
                if distributed.is_main():
                    print(f"{path.name}: continues after round {engine.rounds} of {steps}", file=sys.stderr)
            _train(path, job, checkpoints, steps, engine, stop or (lambda engine: False))
            distributed.on_main(lambda: write_sealed(store, _result_text(path.name, result(engine))))
    return distributed.on_main(lambda: stored_result(store))


def _train(
    path: Path,
    job: Job,
    checkpoints: Checkpoints,
    steps: int,
    engine: "Engine",
    stop: Callable[["Engine"], bool],
) -> None:
    signals: list[int] = []

    def interrupted(number: int, frame: Any) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)
        if distributed.is_main():
            print("stopping after this round (once more to stop at once)", file=sys.stderr)

    with ExitStack() as held, handle_stop_signals(interrupted):
        record = Recorder(path, job, checkpoints, steps, engine, held) if distributed.is_main() else None

        def save() -> None:
            state = engine.state_dict()
            distributed.on_main(lambda: record.save(state, engine) if record else None)

        ended = 0 < engine.rounds < steps and distributed.any_of(stop(engine))
        while engine.rounds < steps and not ended:
            engine.step()
            ended, stopped = distributed.any_of(stop(engine)), distributed.any_of(bool(signals))
            last = ended or engine.rounds == steps
            if record:
                record.log(engine, last)
            if engine.rounds % job.checkpoint_every == 0 or last or stopped:
                save()
            if stopped:
                break
        if distributed.any_of(bool(signals)):
            raise KeyboardInterrupt


def stored_result(store: Path) -> Any:
    """The result of a finished stage, from its file.

    Raises:
        ConfigError: if it is damaged.
    """
    try:
        return json.loads(read_sealed(store))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{store}: this result cannot be read ({error}); remove it, and `mlo resume` computes it again from the "
            "last checkpoint of the stage"
        ) from error


def _result_text(stage: str, result: Any) -> str:
    try:
        return json.dumps(result, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"stage {stage!r}: its result cannot be stored as JSON ({error}); "
            "return finite numbers, text, lists and dictionaries"
        ) from error


class Recorder:
    """Writes a stage's metrics and checkpoints and shows its progress; with several processes, in the first only.

    Lines of metrics after the engine's last round, which a killed process wrote, are removed.
    """

    def __init__(
        self, path: Path, job: Job, checkpoints: Checkpoints, steps: int, engine: "Engine", held: ExitStack
    ) -> None:
        self._path, self._log_every, self._checkpoints, self._by = path, job.log_every, checkpoints, job.keep.by
        self._metrics = held.enter_context(cut_metrics(path, engine.rounds).open("a", encoding="utf-8"))
        self._show = held.enter_context(stage_progress(path.name, steps, engine.rounds))
        self._clock = time.process_time if engine.device.type == "cpu" else time.monotonic
        self._started = self._clock() - training_seconds(path)
        self._heartbeat, self._beat = path.parents[1] / HEARTBEAT, -math.inf

    def log(self, engine: "Engine", last: bool) -> None:
        """Show a round, and log its metrics in the last one and if :func:`mlo.runs.metrics.is_logged` says so.

        Every few seconds, the time of the run's file ``heartbeat`` is set, which says when the run was last alive.
        NaN and infinity are written as null, since JSON has neither.
        """
        step, now = engine.rounds, time.monotonic()
        if now - self._beat >= HEARTBEAT_SECONDS:
            self._heartbeat.touch()
            self._beat = now
        self._show(step, lambda: {name: float(loss) for name, loss in engine.losses.items()})
        if is_logged(step, self._log_every) or last:
            values = {name: value if math.isfinite(value) else None for name, value in engine.metrics().items()}
            self._metrics.write(json.dumps({"step": step, **values}) + "\n")
            self._metrics.flush()

    def save(self, state: Mapping[str, Any], engine: "Engine") -> None:
        """Write a checkpoint of an engine's state, and the seconds trained up to it."""
        os.fsync(self._metrics.fileno())
        self._checkpoints.save(state, None if self._by is None else self._score(engine, self._by))
        write_atomic(self._path / SECONDS, f"{self._clock() - self._started:.3f}\n")

    def _score(self, engine: "Engine", by: str) -> float | None:
        found = engine.metrics()
        if by not in found:
            print(
                f"note: stage {self._path.name} has no metric {by}, so keep.best keeps nothing; it has "
                f"{', '.join(found)}",
                file=sys.stderr,
            )
            self._by = None
        return found.get(by)


def training_seconds(path: Path) -> float:
    """Seconds that a stage had trained at its last checkpoint; see :meth:`mlo.Run.seconds`."""
    try:
        seconds = float((path / SECONDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not started, or damaged
        return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0
