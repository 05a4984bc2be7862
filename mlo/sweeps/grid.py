"""Many runs of jobs side by side: new ones are started, stopped ones resumed, and finished ones left as they are."""

import hashlib
import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mlo.errors import ConfigError
from mlo.options.config import defaults, shown, validate
from mlo.options.yaml_options import flat, merge, nested, of_any_seed
from mlo.runs.folder import LOG, create_folder, discard_folder, has_started, is_free, read_results, stored_job
from mlo.runs.job import Job, load_job
from mlo.sweeps.processes import Command, Failure, run_processes
from mlo.training.devices import known_device


@dataclass(frozen=True)
class Planned:
    """A run to do.

    Attributes:
        folder: its run folder.
        job: the registered name of its job.
        options: those that differ from the job's defaults, nested as in a YAML file.
        uses: names of the options whose files other runs write.
    """

    folder: Path
    job: str
    options: Mapping[str, Any] = field(default_factory=dict)
    uses: Sequence[str] = ()

    def load(self) -> Job:
        """The job with its options; ConfigError if they are not valid."""
        model = load_job(self.job)
        return validate(model, merge(defaults(model), self.options), self.job)

    def started(self) -> bool:
        """Whether something was done in its run folder."""
        return has_started(self.folder)

    def finished(self) -> bool:
        """Whether its results are there."""
        return read_results(self.folder) is not None

    def missing(self) -> list[Path]:
        """The files of other runs that it uses and that do not exist (yet)."""
        files = [Path(self.options[option]) for option in self.uses]
        return [file for file in files if not file.exists()]


def run_all(planned: Sequence[Planned], workers: int = 1, one_core_each: bool = False) -> dict[Path, str]:
    """Finish all planned runs: start the new ones, and resume those that were stopped.

    Finished runs are left as they are. Each run is a `mlo resume` process, with its output in log.txt in its folder.
    One that fails or dies does not stop the others. Runs that use files of other runs come last. If such a file is
    missing, because the run that writes it failed, they fail and are not started.

    Args:
        planned: the runs.
        workers: how many run at the same time.
        one_core_each: pin each process to a different CPU core, with one thread.

    Returns:
        {folder of a run that failed: its error}; empty if all runs are finished.

    Raises:
        ConfigError: before anything runs, as from :func:`check`, or if there are fewer cores than workers.
        KeyboardInterrupt: if a SIGINT or SIGTERM came. Checkpoints were written; call this again to continue.
    """
    check(planned)
    waiting = [plan for plan in planned if not plan.finished()]
    failed: dict[Path, str] = {}
    console = Console(stderr=True)
    columns = TextColumn("[bold]runs"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(planned), completed=len(planned) - len(waiting))

        def ended(plan: Planned, failure: Failure | None) -> None:
            text = plan.folder.name
            if failure:
                failed[plan.folder] = failure.message
                text += f"  FAILED: {failure.message}".partition("\n")[0]
                if failure.refused and plan.folder.is_dir():
                    discard_folder(plan.folder)  # a refused run leaves nothing, as with `mlo run`
            bar.advance(task)
            done = f"{bar.tasks[0].completed:.0f}/{len(planned)}"
            console.print(f"{done}  {text}", soft_wrap=True, markup=False, highlight=False)

        for uses_files in (False, True):
            runs = [plan for plan in waiting if bool(plan.uses) is uses_files]
            run_processes(runs, _command, ended, workers, one_core_each)
    return failed


def _command(plan: Planned) -> Command:
    """The command that does the rest of a run; a run that has not started gets its folder first."""
    missing = plan.missing()
    if missing:
        raise ConfigError(f"not started: {missing[0]} is missing, as the run that writes it failed")
    if not plan.started():
        create_folder(plan.job, plan.load(), plan.folder)
    return ["mlo", "resume", "--", str(plan.folder)], plan.folder / LOG


def report_failures(failed: Mapping[Path, str], total: int) -> bool:
    """Print how many of the runs are finished, and which failed and why; returns whether any did."""
    print(f"{total - len(failed)} of {total} runs are finished")
    for folder, message in failed.items():
        where = f" (see {LOG} in that folder)" if (folder / LOG).exists() else ""
        print(f"failed: {folder}: {message}{where}", file=sys.stderr)
    if failed:
        print("fix the errors, then give the same command again: it does the runs that are left", file=sys.stderr)
    return bool(failed)


def check(planned: Sequence[Planned]) -> None:
    """Check the options, folders and jobs of planned runs before anything runs.

    The check of a job (:meth:`mlo.Job.check`) is done on the CPU, once for all runs that differ only in the seed. It is
    left out for runs that have started, and for those that use files which other runs have yet to write.

    Raises:
        ConfigError: with everything that is wrong.
    """
    errors: dict[str, list[Path]] = {}
    seen: set[Path] = set()
    checked: set[str] = set()
    for plan in planned:
        try:
            job = plan.load()
            error = _conflict(plan, job)
        except ConfigError as invalid:
            errors[str(invalid)] = []
            continue
        if plan.folder in seen:
            error = "is planned twice; each run needs a different folder"
        seen.add(plan.folder)
        kind = _kind(plan, job)
        if not error and kind not in checked and not plan.started() and not plan.missing():
            error = _job_error(job)
            checked.add(kind)
        if error:
            errors.setdefault(error, []).append(plan.folder)
    if errors:
        raise ConfigError("\n".join(_prefix(folders) + error for error, folders in errors.items()))


def _kind(plan: Planned, job: Job) -> str:
    """A text that is the same for runs that differ only in the seed."""
    options = flat(job.model_dump(mode="json", exclude={"seed"}))
    return json.dumps([plan.job, {name: of_any_seed(value, job.seed) for name, value in options.items()}])


def _prefix(folders: Sequence[Path]) -> str:
    others = f" (and {len(folders) - 1} more)" if len(folders) > 1 else ""
    return f"{folders[0]}{others}: " if folders else ""


def _job_error(job: Job) -> str | None:
    """What the job's check reports. It runs on the CPU, so that this process takes no memory of a GPU."""
    try:
        known_device(job.device)
        job.model_copy(update={"device": "cpu"}).check()
    except ConfigError as error:
        return str(error)
    return None


def _conflict(plan: Planned, job: Job) -> str | None:
    """How the run in a folder differs from the planned one; None if the folder is free or holds this run."""
    folder = plan.folder
    if not folder.exists() or (folder.is_dir() and is_free(folder)):
        return None
    name, stored = stored_job(folder)
    remedy = "give another --output, or the options that it was started with, or remove that folder"
    if name != plan.job:
        return f"holds a run of {name}, not of {plan.job}; {remedy}"
    old, new = (flat(one.model_dump(mode="json")) for one in (stored, job))
    differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    listed = ", ".join(f"{name} is {shown(old.get(name))} there, {shown(new.get(name))} here" for name in differing)
    return f"holds a run with other options ({listed}); {remedy}" if differing else None


def grid(
    job: str, options: Mapping[str, Any], values: Mapping[str, Sequence[Any]], seeds: int, folder: Path
) -> list[Planned]:
    """A run for each combination of values and each seed, in a folder named after them.

    Args:
        job: the registered name of the job.
        options: the options that all runs share.
        values: {dotted name of an option: its values}.
        seeds: how many seeds, from 0.
        folder: where the run folders go.
    """
    planned = []
    for chosen in itertools.product(*values.values()):
        combined = dict(options)
        for path, value in zip(values, chosen, strict=True):
            combined = merge(combined, nested(path.split("."), value))
        words = [f"{path}={_word(value)}" for path, value in zip(values, chosen, strict=True)]
        for seed in range(seeds):
            planned.append(Planned(folder / ",".join([*words, f"seed={seed}"]), job, {**combined, "seed": seed}))
    return planned


def _word(value: Any) -> str:
    """A value as part of a folder's name; if characters are lost, some letters of a hash make it unique."""
    text = value if isinstance(value, str) else json.dumps(value)
    word = "+".join(map(str, value)) if isinstance(value, list) else text
    fit = re.sub(r"[^\w.+-]+", "-", word)[:40].strip("-")
    return fit if fit == word and fit else f"{fit}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
