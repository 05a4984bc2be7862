"""The folder of a run on the disk.

``config.yaml`` holds every option, ``run.json`` the job's registered name, the versions of Python and packages, an
identifier of the run and a digest of its options, ``stages/<name>/`` what :class:`mlo.Run` describes, and
``results.json``, once the run is finished, what the job returned, with its digest beside it. The time of ``heartbeat``
says when the run was last alive. Other files are the job's own.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from filelock import FileLock, Timeout

from mlo.errors import ConfigError
from mlo.files import write_atomic
from mlo.options.config import validate
from mlo.options.registry import versions
from mlo.options.yaml_options import flat, read_yaml
from mlo.runs.job import Job, Results, load_job
from mlo.runs.sealed import read_sealed, write_sealed

RUNS = Path("runs")
RESULTS = "results.json"
OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}  # whatever the file
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
    info |= {"id": secrets.token_hex(8), "options": options_digest(job)}
    with files_of(path), locked(path):
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


class RunInfo(NamedTuple):
    """What run.json says about a run.

    Attributes:
        job: the registered name of its job.
        versions: of Python and packages, when it was started.
        id: an identifier that no other run has; None if the file was not written by :func:`create_folder`.
        options: the digest of its options; None as ``id``.
    """

    job: str
    versions: dict[str, str]
    id: str | None
    options: str | None


def run_info(path: Path) -> RunInfo:
    """What the run.json of a folder says.

    Raises:
        ConfigError: if it is no run folder.
    """
    try:
        info = json.loads((path / "run.json").read_text(encoding="utf-8"))
        found = RunInfo(info["job"], info["versions"], info.get("id"), info.get("options"))
        if type(found.job) is not str or type(found.versions) is not dict:
            raise ValueError("another form")
        return found
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
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
        ConfigError: if it is no run folder, its job or its options no longer exist, or its options are not all those
            that the run was started with.
    """
    info, config = run_info(path), path / "config.yaml"
    given = read_yaml(config)
    job = validate(load_job(info.job), given, str(config))
    remedy = f"restore the file, or start another run with these options: mlo run {info.job} --config {config}"
    lost = flat(job.model_dump(mode="json")).keys() - flat(given).keys()
    if lost:
        raise ConfigError(
            f"{config}: {', '.join(sorted(lost)[:8])} is missing, and a run's options are all there; {remedy}"
        )
    if info.options not in (None, options_digest(job)):
        raise ConfigError(f"{config}: the options are not those that the run was started with; {remedy}")
    return info.job, job


def stage_identity(path: Path, job: Job, stage: str) -> dict[str, Any]:
    """What all checkpoints of a stage of a run have in common, and those of no other stage or run."""
    return {"run": run_info(path).id, "stage": stage, "seed": job.seed, "configuration": options_digest(job)}


def options_digest(job: Job) -> str:
    """A digest of all options of a job."""
    return hashlib.sha256(json.dumps(job.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def read_results(path: Path) -> Results | None:
    """The results of the job in a run folder; None if the run is not finished.

    Raises:
        ConfigError: if the file is not what a run writes.
    """
    file = path / RESULTS
    try:
        return _checked(json.loads(read_sealed(file)))
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        existing = next(some for some in (path, *path.parents) if some.exists())
        raise ConfigError(f"{existing}: a file, not a folder for runs; give another --output") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); delete it and run `mlo resume {path}`") from error


@contextmanager
def files_of(path: Path) -> Iterator[None]:
    """A context in which a file of a run folder that cannot be written is a ConfigError, such as on a full disk."""
    try:
        yield
    except OSError as error:
        inside = error.filename is not None and path.resolve() in Path(str(error.filename)).resolve().parents
        if error.errno not in OF_THE_DISK and not inside:
            raise
        raise ConfigError(
            f"{error.filename if inside else path}: cannot be used ({error.strerror or error}); make room or give "
            f"access there, or remove what is in its place, then continue with: mlo resume {path}"
        ) from error


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
    write_sealed(path / RESULTS, text)


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
