"""Whether the files of a run folder are whole: read one by one, without going on with the run."""

from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from mlo.errors import MloError
from mlo.runs.checkpoints import Checkpoints
from mlo.runs.folder import RESULTS, read_results, stage_identity, stored_job
from mlo.runs.metrics import METRICS, damaged_lines
from mlo.runs.stage import HEARTBEAT, stored_result


def check_folder(path: Path) -> Iterator[tuple[Path, str | None]]:
    """Each file that a run reads when it is resumed, and what is wrong with it; None if nothing is.

    Raises:
        ConfigError: if it is no run folder, or its options are not those that it was started with.
    """
    _, job = stored_job(path)
    yield path / "config.yaml", None
    stages = path / "stages"
    for stage in sorted(stages.iterdir() if stages.is_dir() else ()):
        lines = damaged_lines(stage)
        if (stage / METRICS).exists():
            yield stage / METRICS, f"{stage / METRICS}: line {', '.join(map(str, lines))}" if lines else None
        yield from Checkpoints(stage, stage_identity(path, job, stage.name)).faults().items()
        if (stage / "result.json").exists():
            yield stage / "result.json", _fault(stored_result, stage / "result.json")
    if (path / RESULTS).exists():
        yield path / RESULTS, _fault(read_results, path)


def last_alive(path: Path) -> datetime | None:
    """When a run in a folder last took a round, to a few seconds; None if it never did."""
    heartbeat = path / HEARTBEAT
    return datetime.fromtimestamp(heartbeat.stat().st_mtime).astimezone() if heartbeat.exists() else None


def _fault(read: Callable[[Path], Any], path: Path) -> str | None:
    try:
        read(path)
    except MloError as error:
        return str(error)
    return None
