"""A run: a job in its folder, which trains stages and can be resumed."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mlo.errors import ConfigError
from mlo.files import remove_temporary
from mlo.ops import distributed
from mlo.ops.rng import derived_seed, seeded
from mlo.options.registry import versions
from mlo.runs.folder import (
    create_folder,
    files_of,
    has_started,
    locked,
    run_info,
    stage_identity,
    stored_job,
    write_results,
)
from mlo.runs.job import Job
from mlo.runs.kernels import chosen_kernels
from mlo.runs.metrics import read_metrics
from mlo.runs.stage import run_stage, training_seconds

if TYPE_CHECKING:
    from mlo.training.engine import Engine


class Run:
    """A job in its run folder. :meth:`mlo.Job.run` gets it, and trains stages with it.

    ``stages/<name>/`` holds the metrics, checkpoints, seconds and result of a stage. A job may write files of its own
    to ``path``.

    Attributes:
        path: the folder.
        job: the job, with its options.
    """

    def __init__(self, path: Path, job: Job) -> None:
        self.path = path
        self.job = job
        self._stages: set[str] = set()
        self._announced = False

    @classmethod
    def create(cls, name: str, job: Job, output: Path | None = None) -> Self:
        """Check a job, and create a run folder for it.

        Args:
            name: the job's registered name.
            job: the job.
            output: the folder; runs/<name>-<date>-<time> by default.

        Raises:
            ConfigError: if ``output`` is not empty or cannot be created, if the job is for one process and there are
                several, or from the job's :meth:`mlo.Job.check`.
        """
        _refuse_processes(name, job)
        job.check()
        return cls(distributed.on_main(lambda: create_folder(name, job, output)), job)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open an existing run folder, with the options that the run was started with.

        Raises:
            ConfigError: if it is no run folder, if its job or its options no longer exist, or, in a run that did
                nothing yet, from the job's :meth:`mlo.Job.check`.
        """
        name, job = stored_job(path)
        old = run_info(path).versions
        _refuse_processes(name, job)
        new = versions()
        changed = [f"{what} {old.get(what)} then, {new[what]} now" for what in new if old.get(what) != new[what]]
        if changed and distributed.is_main():
            note = f"note: {path} was started with other versions, so numbers may differ: {', '.join(changed)}"
            print(note, file=sys.stderr)
        if not distributed.on_main(lambda: has_started(path)):
            job.check()
        return cls(path, job)

    def execute(self) -> None:
        """Run the job, or the rest of it, and store its results.

        Raises:
            ConfigError: if another process runs in this folder, a file of it cannot be read or written, or the results
                cannot be stored.
            KeyboardInterrupt: if a SIGINT or SIGTERM came; a stage wrote a checkpoint.
        """
        with contextlib.ExitStack() as held:
            held.enter_context(files_of(self.path))
            distributed.on_main(lambda: held.enter_context(locked(self.path)))
            distributed.on_main(lambda: remove_temporary(self.path))
            with chosen_kernels(self.job), seeded(derived_seed(self.job.seed, "")):
                results = self.job.run(self)
            distributed.on_main(lambda: write_results(self.path, results or {}))

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
        identity = distributed.on_main(lambda: stage_identity(self.path, self.job, name))
        return run_stage(folder, self.job, identity, steps, lambda: self._built(engine), result, stop)

    def metrics(self, stage: str, most: int | None = None) -> list[dict[str, Any]]:
        """The metrics that a stage has logged so far, a dictionary for each line; empty if it has not started.

        Damaged lines are reported and left out. If ``most`` is given, these are about so many lines at most, from all
        parts of the file and with the last one, and a long file is read quickly.
        """
        return read_metrics(self.path / "stages" / stage, most)

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


def _refuse_processes(name: str, job: Job) -> None:
    if distributed.world() > 1 and not job.data_parallel:
        raise ConfigError(
            f"{name} runs in a single process, since it does not divide its batches among processes, and there are "
            f"{distributed.world()}; start it without torchrun: mlo run {name} ..."
        )
