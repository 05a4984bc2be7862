"""The folder of a run on the disk.

``config.yaml`` holds every option, ``run.json`` the job's registered name and the versions of Python and packages,
``stages/<name>/`` what :class:`mlo.Run` describes, and ``results.json``, once the run is finished, what the job
returned. Other files are the job's own.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from mlo.errors import ConfigError
from mlo.files import write_atomic
from mlo.options.config import validate
from mlo.options.registry import versions
from mlo.options.yaml_options import read_yaml
from mlo.runs.job import Job, Results, load_job

RUNS = Path("runs")
RESULTS = "results.json"
LOG = "log.txt"
CREATED = ("config.yaml", "run.json", ".lock", LOG)
PARTLY_WRITTEN = re.compile(r"\.(config\.yaml|run\.json)\.\d+\.tmp")


def create_folder(name: str, job: Job, output: Path | None = None) -> Path:
    """Create a run folder, without checking the job; returns its path. See :meth:`mlo.Run.create`."""
    path = output or RUNS / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    try:
        if output is None:
            path = _new_folder(path)
        path.mkdir(parents=True, exist_ok=True)
        full = not is_free(path)
    except OSError as error:
        raise ConfigError(
            f"{path}: the folder cannot be created there ({error.strerror}); give another --output"
        ) from error
    if full:
        raise ConfigError(
            f"{path}: the folder is not empty, and nothing is overwritten; "
            f"resume the run in it (mlo resume {path}) or give another --output"
        )
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    info = {"job": name, "started": now, "versions": versions()}
    with locked(path):
        write_atomic(path / "run.json", json.dumps(info, indent=2) + "\n")  # first, since it says whose options follow
        write_atomic(path / "config.yaml", _options_text(job))
    return path


def discard_folder(path: Path) -> None:
    """Remove the folder of a run that has not started, unless another process runs in it."""
    with contextlib.suppress(ConfigError):
        with locked(path):
            if has_started(path) or not (path / "run.json").exists():
                return
            for name in CREATED:
                with contextlib.suppress(PermissionError):  # on Windows .lock is open; releasing it deletes it there
                    (path / name).unlink(missing_ok=True)
        if not any(path.iterdir()):
            path.rmdir()


def has_started(path: Path) -> bool:
    """Whether a run did something in its folder: it holds more files than creating it leaves."""
    return (path / "run.json").exists() and not _only_created(path)


def is_free(path: Path) -> bool:
    """Whether a run can be created in a folder: it is empty, or a run was created there but never started.

    A config.yaml that was edited, or that belongs to no run, counts as the user's file, so that folder is not free.
    """
    config = path / "config.yaml"
    try:
        if config.exists():
            return _only_created(path) and _options_text(stored_job(path)[1]) == config.read_text(encoding="utf-8")
        if (path / "run.json").exists():
            run_info(path)
        return _only_created(path)
    except ConfigError:
        return False


def _only_created(path: Path) -> bool:
    return all(file.name in CREATED or PARTLY_WRITTEN.fullmatch(file.name) for file in path.iterdir())


def run_info(path: Path) -> tuple[str, dict[str, str]]:
    """The registered name of a run folder's job, and the versions that the run was started with.

    Raises:
        ConfigError: if it is no run folder.
    """
    try:
        info = json.loads((path / "run.json").read_text(encoding="utf-8"))
        return info["job"], info["versions"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a run folder: it has no readable run.json{_runs_in(path)}") from error


def _runs_in(folder: Path, most: int = 8) -> str:
    """Which runs are in a folder or one level below; the unfinished first."""
    found = {file.parent for pattern in ("*/run.json", "*/*/run.json") for file in folder.glob(pattern)}
    finished = {run: (run / RESULTS).exists() for run in sorted(found)}
    runs = [f"{run}{' (finished)' * finished[run]}" for run in sorted(finished, key=finished.__getitem__)]
    more = f" and {len(runs) - most} more" if len(runs) > most else ""
    return f"; it contains the runs {', '.join(runs[:most])}{more}" if runs else ""


def stored_job(path: Path) -> tuple[str, Job]:
    """The registered name of a run folder's job, and the job with the options that the run was started with.

    Raises:
        ConfigError: if it is no run folder, or its job or its options no longer exist.
    """
    name, _ = run_info(path)
    return name, validate(load_job(name), read_yaml(path / "config.yaml"), str(path / "config.yaml"))


def read_results(path: Path) -> Results | None:
    """The results of the job in a run folder; None if the run is not finished.

    Raises:
        ConfigError: if the file is not what a run writes.
    """
    file = path / RESULTS
    try:
        return _checked(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        existing = next(some for some in (path, *path.parents) if some.exists())
        raise ConfigError(f"{existing}: a file, not a folder for runs; give another --output") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); delete it and run `mlo resume {path}`") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from running in a folder.

    Raises:
        ConfigError: if one does already.
    """
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


def write_results(path: Path, results: Results) -> None:
    """Write the results of the job in a run folder, which marks the run as finished.

    Raises:
        ConfigError: if they have the wrong form.
    """
    try:
        text = json.dumps(_checked(results), indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the value that the job's run() returned cannot be stored ({error}); "
            "return {row: {measure: value}}, each value a finite number or text"
        ) from error
    write_atomic(path / RESULTS, text)


def _checked(results: Results) -> Results:
    """The results, if they have the right form; else a ValueError says what is wrong."""
    if not isinstance(results, Mapping):
        raise ValueError(f"{results!r} is no mapping")
    for row, measures in results.items():
        if not isinstance(measures, Mapping):
            raise ValueError(f"row {row!r} is {measures!r}")
        for measure, value in measures.items():
            if not isinstance(value, int | float | str):
                raise ValueError(f"{measure!r} of row {row!r} is {value!r}")
    return results


def _new_folder(path: Path) -> Path:
    """Create ``path``, or ``path`` with -2, -3, ... appended if other runs start in the same second."""
    for number in itertools.count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError
