"""A run folder: what was run and with which options, and a subfolder for each stage; a stopped run goes on from it."""

import contextlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml
from filelock import FileLock, Timeout

from mlo.errors import ConfigError
from mlo.files import write_atomic
from mlo.ops import distributed
from mlo.options.config import validate
from mlo.options.registry import versions
from mlo.options.yaml_options import read_yaml
from mlo.runs.job import Job, Results, load_job
from mlo.runs.stage import METRICS, Stage, seconds_taken

if TYPE_CHECKING:
    from mlo.training.engine import Engine

RUNS = Path("runs")
RESULTS = "results.json"
OF_CREATION = re.compile(r"config\.yaml|run\.json|\.lock|log\.txt|\.(config\.yaml|run\.json)\.\d+\.tmp")


class Run:
    """An open run folder.

    ``config.yaml`` holds every option, ``run.json`` the job's registered name and the versions of what ran it, and
    ``stages/<name>/`` a stage's metrics, checkpoints, seconds and result. ``results.json`` is there once the run is
    finished, and holds what the job returned. Anything else is the job's own.

    Attributes:
        path: the folder.
        job: the job that runs in it.
    """

    def __init__(self, path: Path, job: Job) -> None:
        self.path = path
        self.job = job
        self._stages: set[str] = set()
        self._told = False

    @classmethod
    def create(cls, name: str, job: Job, output: Path | None = None) -> Self:
        """A new run folder for a job registered as ``name``: ``output``, or runs/<name>-<date>-<time>.

        Raises:
            ConfigError: if ``output`` holds something already, or cannot be made, or the job is for one process and
                there are several, or the job's own :meth:`mlo.runs.job.Job.check` has found something.
        """
        _refuse_processes(name, job)
        job.check()
        return cls(distributed.on_main(lambda: cls._begun(name, job, output)), job)

    @staticmethod
    def _begun(name: str, job: Job, output: Path | None) -> Path:
        """The folder, with what says of which run it is."""
        path = output or RUNS / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
        try:
            if output is None:
                path = _made(path)
            path.mkdir(parents=True, exist_ok=True)
            full = not is_free(path, job)
        except OSError as error:
            raise ConfigError(
                f"{path}: no folder can be made there ({error.strerror}); give another --output"
            ) from error
        if full:
            raise ConfigError(
                f"{path}: holds something already, and nothing is written over; "
                f"go on with that run (mlo resume {path}) or give another --output"
            )
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        begun = {"job": name, "started": now, "versions": versions()}
        with _locked(path):
            write_atomic(path / "run.json", json.dumps(begun, indent=2) + "\n")  # tells whose the next file is
            write_atomic(path / "config.yaml", _options_text(job))
        return path

    @classmethod
    def open(cls, path: Path) -> Self:
        """The run in an existing folder, with the options that it was begun with.

        Raises:
            ConfigError: if it is no run folder, or its job or its options are not known any more.
        """
        _, old = about(path)
        name, job = begun_with(path)
        _refuse_processes(name, job)
        new = versions()
        changed = [f"{what} {old.get(what)} then, {new[what]} now" for what in new if old.get(what) != new[what]]
        if changed and distributed.is_main():
            note = f"note: {path} was begun with other versions, so numbers may differ: {', '.join(changed)}"
            print(note, file=sys.stderr)
        return cls(path, job)

    def execute(self) -> None:
        """Run the job, or what is left of it, and store what it found.

        Raises:
            ConfigError: if another process runs in this folder, or what the job returned cannot be stored.
            KeyboardInterrupt: if a SIGINT or SIGTERM came; a stage wrote a checkpoint.
        """
        with self.locked():
            found = self.job.run(self)
            distributed.on_main(lambda: write_atomic(self.path / RESULTS, _text(found or {})))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes than those of this run from running in its folder meanwhile.

        Raises:
            ConfigError: if one does already.
        """
        with contextlib.ExitStack() as held:
            distributed.on_main(lambda: held.enter_context(_locked(self.path)))
            yield

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """What a stage has logged so far, a dictionary for each line; none for a stage that has not begun."""
        path = self.path / "stages" / stage / METRICS
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def seconds(self, stage: str) -> float:
        """Seconds that a stage has trained so far, the time between interruptions left out.

        On a card it is wall-clock time, on the CPU the time of all its threads, which a busy machine does not change;
        of several processes it is the first one's.
        """
        return seconds_taken(self.path / "stages" / stage)

    def discard(self) -> None:
        """Take away what :meth:`create` wrote, if nothing else is there and no other process runs in the folder."""
        with contextlib.suppress(ConfigError), _locked(self.path):
            if not has_begun(self.path):
                for name in ("config.yaml", "run.json", ".lock"):
                    (self.path / name).unlink(missing_ok=True)
                if not any(self.path.iterdir()):
                    self.path.rmdir()

    def stage(
        self,
        name: str,
        engine: Callable[[], "Engine"],
        steps: int,
        result: Callable[["Engine"], Any],
        stop: Callable[["Engine"], bool] | None = None,
    ) -> Any:
        """Train an engine for ``steps`` rounds and return ``result(engine)``; done once in the life of the run.

        A finished stage returns its stored result and builds nothing; one that was stopped goes on from its last
        checkpoint. The engine is built under a seed made from the job's seed and the stage's name.

        Args:
            name: the stage's name, of a form that a folder can have; no two stages of a run have the same.
            engine: builds the engine.
            steps: rounds in all, those before a resumption included.
            result: what is kept of the trained engine; made of what JSON has, and returned as JSON gives it back. Of
                several processes the first alone calls it, and all return what it gave.
            stop: ends the stage early where it returns True. Asked after each round, before the metrics and the
                checkpoint of that round are written, and once more of an engine that goes on from a checkpoint: what it
                remembers belongs in the engine's state (a module's buffers or extra state), and it must answer the
                same question the same way twice.

        Raises:
            ConfigError: if two stages have one name, or the result is not made of what JSON has.
            KeyboardInterrupt: if a SIGINT or SIGTERM came; a checkpoint was written.
        """
        if name in self._stages:
            raise ConfigError(f"two stages of this job are named {name!r}; give each a name of its own")
        self._stages.add(name)
        return Stage(self.path / "stages" / name, self.job, steps).run(lambda: self._built(engine), result, stop)

    def _built(self, engine: Callable[[], "Engine"]) -> "Engine":
        """The engine; the first one that could be built says that there is something in the folder to come back to."""
        made = engine()
        if distributed.is_main() and not self._told:
            print(f"run folder: {self.path}", flush=True)
            self._told = True
        return made


def has_begun(path: Path) -> bool:
    """Whether a folder is a run's in which something was done: it holds more than what its creation leaves."""
    return (path / "run.json").exists() and not _of_creation(path)


def is_free(path: Path, job: Job) -> bool:
    """Whether creating the job's run in a folder loses nothing: there is nothing, or what a creation left unedited."""
    config = path / "config.yaml"
    try:
        if (path / "run.json").exists():
            job = begun_with(path)[1] if config.exists() else (about(path) and job)
        return _of_creation(path) and (not config.exists() or config.read_bytes() == _options_text(job).encode())
    except ConfigError:
        return False


def _of_creation(path: Path) -> bool:
    return all(OF_CREATION.fullmatch(file.name) for file in path.iterdir())


def about(path: Path) -> tuple[str, dict[str, str]]:
    """The registered name of a run folder's job, and the versions that it was begun with.

    Raises:
        ConfigError: if it is no run folder.
    """
    try:
        told = json.loads((path / "run.json").read_text(encoding="utf-8"))
        return told["job"], told["versions"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fault = f"{path}: is no run folder, for it has no run.json that can be read"
        raise ConfigError(fault + _runs_in(path)) from error


def _runs_in(folder: Path, most: int = 8) -> str:
    """Which runs are in a folder, or in those in it; the unfinished first."""
    found = {file.parent for pattern in ("*/run.json", "*/*/run.json") for file in folder.glob(pattern)}
    finished = {run: (run / RESULTS).exists() for run in sorted(found)}
    runs = [f"{run}{' (finished)' * finished[run]}" for run in sorted(finished, key=finished.__getitem__)]
    more = f" and {len(runs) - most} more" if len(runs) > most else ""
    return f"; runs in it are: {', '.join(runs[:most])}{more}" if runs else ""


def begun_with(path: Path) -> tuple[str, Job]:
    """The registered name of a run folder's job, and the job with the options that it was begun with.

    Raises:
        ConfigError: if it is no run folder, or its job or its options are not known any more.
    """
    name, _ = about(path)
    return name, validate(load_job(name), read_yaml(path / "config.yaml"), str(path / "config.yaml"))


def read_results(path: Path) -> Results | None:
    """What the job of a run folder found; None if the run is not finished.

    Raises:
        ConfigError: if the file is not what a run writes.
    """
    file = path / RESULTS
    try:
        return _checked(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        there = next(some for some in (path, *path.parents) if some.exists())
        raise ConfigError(f"{there}: is a file, and no folder for runs; give another --output") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); delete it and run `mlo resume {path}`") from error


def _refuse_processes(name: str, job: Job) -> None:
    if distributed.world() > 1 and not job.data_parallel:
        raise ConfigError(
            f"{name} runs in one process alone, for it does not share out its batches among {distributed.world()}; "
            f"start it without torchrun: mlo run {name} ..."
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(path / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(f"{path}: another process is running in this folder; wait for it, or stop it") from None
    try:
        yield
    finally:
        lock.release()


def _options_text(job: Job) -> str:
    return yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False)


def _text(found: Results) -> str:
    try:
        return json.dumps(_checked(found), indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"what the job's run() returned cannot be stored ({error}); "
            "return {row: {measure: value}}, each value a finite number or text"
        ) from error


def _checked(found: Results) -> Results:
    """The results, if they are of their form; ValueError says what is not."""
    if not isinstance(found, Mapping):
        raise ValueError(f"{found!r} is no mapping")
    for row, measures in found.items():
        if not isinstance(measures, Mapping):
            raise ValueError(f"row {row!r} is {measures!r}")
        for measure, value in measures.items():
            if not isinstance(value, int | float | str):
                raise ValueError(f"{measure!r} of row {row!r} is {value!r}")
    return found


def _made(path: Path) -> Path:
    """A folder that nobody else has: ``path``, or with -2, -3, ... after it where runs begin in the same second."""
    for number in itertools.count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError
