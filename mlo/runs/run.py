"""An open run folder: where a job trains its stages, and reads what they logged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlo.errors import ConfigError
from mlo.ops import distributed
from mlo.runs.settings import RunSettings
from mlo.runs.stage import METRICS, run_stage, training_seconds

if TYPE_CHECKING:
    from mlo.training.engine import Engine


class Run:
    """What :meth:`mlo.Job.run` gets: an open run folder, with ``stages/<name>/`` for each stage.

    A stage's folder holds its metrics, checkpoints, seconds and result. A job may write files of its own to ``path``.

    Attributes:
        path: the folder.
        settings: the seed, threads and intervals of its stages.
    """

    def __init__(self, path: Path, settings: RunSettings) -> None:
        self.path = path
        self.settings = settings
        self._stages: set[str] = set()
        self._announced = False

    def stage(
        self,
        name: str,
        engine: Callable[[], "Engine"],
        steps: int,
        result: Callable[["Engine"], Any],
        stop: Callable[["Engine"], bool] | None = None,
    ) -> Any:
        """Train an engine for ``steps`` rounds and return ``result(engine)``.

        A stage is trained once: if it is finished, its stored result is returned and nothing is built; if it was
        stopped, it continues from its last checkpoint. The engine is built under a seed made from the run's seed and
        the stage's name.

        Args:
            name: the stage's name, which also names its folder; each stage of a run needs a different one.
            engine: builds the engine.
            steps: total number of rounds, including those before a resumption.
            result: computes what to keep of the trained engine. It must return what JSON can store, and is returned as
                JSON reads it back. With several processes only the first one calls it, and all return its result.
            stop: ends the stage early when it returns True. It is called after each round, before that round's metrics
                and checkpoint are written, and once more when an engine continues from a checkpoint. What it remembers
                must be part of the engine's state (a module's buffers or extra state), and it must give the same answer
                when it is called twice.

        Raises:
            ConfigError: if two stages have the same name, or JSON cannot store the result.
            KeyboardInterrupt: if a SIGINT or SIGTERM came; a checkpoint was written.
        """
        if name in self._stages:
            raise ConfigError(f"two stages of this job are named {name!r}; give each a different name")
        self._stages.add(name)
        folder = self.path / "stages" / name
        return run_stage(folder, self.settings, steps, lambda: self._built(engine), result, stop)

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """The metrics that a stage has logged so far, a dictionary for each line; empty if it has not started."""
        path = self.path / "stages" / stage / METRICS
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def seconds(self, stage: str) -> float:
        """Seconds that a stage has trained so far, not counting the time between a stop and a resumption.

        On a GPU it is wall-clock time. On the CPU it is the CPU time of all threads, which does not depend on what else
        the machine does. With several processes it is the time of the first one.
        """
        return training_seconds(self.path / "stages" / stage)

    def _built(self, engine: Callable[[], "Engine"]) -> "Engine":
        """Build the engine, and print the folder once a first engine could be built."""
        built = engine()
        if distributed.is_main() and not self._announced:
            print(f"run folder: {self.path}", flush=True)
            self._announced = True
        return built
