"""Many runs of jobs in local processes: each begun, gone on with, or left as it is where it is finished."""

import hashlib
import itertools
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mlo.errors import ConfigError, MloError
from mlo.options.config import defaults, validate
from mlo.options.yaml_options import flat, merge, nested, of_any_seed, shown
from mlo.runs.job import Job, load_job
from mlo.runs.run import Run, begun_with, has_begun, is_free, read_results
from mlo.sweeps.workers import Failed, in_processes, own_cores
from mlo.training.plan import known_device

LOG = "log.txt"


@dataclass(frozen=True)
class Planned:
    """A run that is to be there.

    Attributes:
        folder: its run folder.
        job: the registered name of its job.
        options: those that differ from the job's defaults, nested as a YAML file has them.
    """

    folder: Path
    job: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def made(self) -> Job:
        """The job with its options; ConfigError if they are not valid."""
        model = load_job(self.job)
        return validate(model, merge(defaults(model), self.options), self.job)

    def begun(self) -> bool:
        """Whether something was done in its run folder, be it finished or not."""
        return has_begun(self.folder)

    def finished(self) -> bool:
        """Whether the run is there already, whole."""
        return read_results(self.folder) is not None


@dataclass(frozen=True)
class Failure:
    """A run that did not get to its end.

    Attributes:
        folder: its run folder.
        message: why, in words; the run's log.txt has more.
    """

    folder: Path
    message: str


def run_all(planned: Sequence[Planned], workers: int = 1, one_core_each: bool = False) -> list[Failure]:
    """Have all planned runs finished: begin those that are not there, go on with those that were stopped.

    A finished run is left as it is. What a run prints goes to log.txt in its folder. One that fails, or whose process
    dies, takes no other with it.

    Args:
        planned: the runs.
        workers: how many processes run at a time; each does one run after another.
        one_core_each: keep each process on a core of its own, with one thread.

    Returns:
        The runs that failed; empty if all are finished.

    Raises:
        ConfigError: before anything runs, with all that is wrong with the options and the folders, and all that the
            jobs have looked for in vain (:meth:`mlo.runs.job.Job.check`).
        KeyboardInterrupt: if a SIGINT or SIGTERM came; checkpoints were written, and the same call goes on.
    """
    check(planned)
    if one_core_each:
        own_cores(workers)
    waiting = [plan for plan in planned if not plan.finished()]
    failures: list[Failure] = []
    with _Told(len(planned), len(planned) - len(waiting)) as told:
        for plan, outcome in in_processes(execute, waiting, workers, one_core_each):
            failure = Failure(plan.folder, outcome.message) if isinstance(outcome, Failed) else None
            failures += [failure] if failure else []
            told.done(plan, failure)
    return failures


def report_failures(failures: Sequence[Failure], total: int) -> bool:
    """Print how many of the runs are finished, and which failed and why; whether any did."""
    print(f"{total - len(failures)} of {total} runs are finished")
    for failure in failures:
        where = f" (its output is in {LOG} there)" if (failure.folder / LOG).exists() else ""
        print(f"failed: {failure.folder}: {failure.message}{where}", file=sys.stderr)
    if failures:
        print("mend what is wrong; the same command does what is left", file=sys.stderr)
    return bool(failures)


def check(planned: Sequence[Planned], there: bool = True) -> None:
    """Raise a ConfigError that tells everything for which the planned runs could not begin.

    Args:
        planned: the runs.
        there: ask the jobs too whether what their options name is there, of runs that differ in the seed alone one.
    """
    faults: dict[str, list[Path]] = {}
    seen: set[Path] = set()
    asked: set[str] = set()
    for plan in planned:
        try:
            job = plan.made()
            found = _held_already(plan, job)
        except ConfigError as error:
            faults.setdefault(str(error), [])
            continue
        if plan.folder in seen:
            found = "is planned twice; each run needs a folder of its own"
        kind = _kind(plan, job)
        if there and not found and kind not in asked and not plan.begun():
            found = _not_there(job)
            asked.add(kind)
        if found:
            faults.setdefault(found, []).append(plan.folder)
        seen.add(plan.folder)
    if faults:
        raise ConfigError("\n".join(_at(folders) + fault for fault, folders in faults.items()))


def _kind(plan: Planned, job: Job) -> str:
    """What runs have in common that differ in the seed alone."""
    options = flat(job.model_dump(mode="json", exclude={"seed"}))
    return json.dumps([plan.job, {name: of_any_seed(value, job.seed) for name, value in options.items()}])


def _not_there(job: Job) -> str | None:
    """What a job asks for and is not there; looked for on the CPU, since cards are the workers'."""
    try:
        known_device(job.device)
        job.model_copy(update={"device": "cpu"}).check()
    except ConfigError as error:
        return str(error)
    return None


def _at(folders: Sequence[Path]) -> str:
    others = f" (and {len(folders) - 1} more)" if len(folders) > 1 else ""
    return f"{folders[0]}{others}: " if folders else ""


def _held_already(plan: Planned, job: Job) -> str | None:
    """What a folder holds, if that is something else than this run."""
    folder = plan.folder
    if not folder.exists() or (folder.is_dir() and is_free(folder, job)):
        return None
    name, there = begun_with(folder)
    if name != plan.job:
        return f"holds a run of {name}, not of {plan.job}; {_REMEDY}"
    old, new = (flat(made.model_dump(mode="json")) for made in (there, job))
    differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    said = ", ".join(f"{name} is {shown(old.get(name))} there, {shown(new.get(name))} here" for name in differing)
    return f"holds a run with other options ({said}); {_REMEDY}" if differing else None


_REMEDY = "give another --output, or the options that it was begun with, or take that folder away"


def grid(
    job: str, options: Mapping[str, Any], values: Mapping[str, Sequence[Any]], seeds: int, folder: Path
) -> list[Planned]:
    """A run for each combination of the values and each seed, in a folder named after them.

    Args:
        job: the registered name of the job.
        options: what all runs have in common.
        values: {dotted name of an option: its values}.
        seeds: how many seeds, from 0.
        folder: where the run folders go.
    """
    planned = []
    for chosen in itertools.product(*values.values()):
        over = dict(options)
        for path, value in zip(values, chosen, strict=True):
            over = merge(over, nested(path.split("."), value))
        words = [f"{path}={_word(value)}" for path, value in zip(values, chosen, strict=True)]
        for seed in range(seeds):
            planned.append(Planned(folder / ",".join([*words, f"seed={seed}"]), job, {**over, "seed": seed}))
    return planned


def _word(value: Any) -> str:
    """A value as a part of a folder's name; where that loses something, some letters of a hash stand for it."""
    text = value if isinstance(value, str) else json.dumps(value)
    word = "+".join(map(str, value)) if isinstance(value, list) else text
    fit = re.sub(r"[^\w.+-]+", "-", word)[:40].strip("-")
    return fit if fit == word and fit else f"{fit}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def execute(plan: Planned) -> None:
    """Do one planned run, or the rest of it, in this process."""
    if plan.finished():
        return
    run = None if plan.begun() else Run.create(plan.job, plan.made(), plan.folder)  # what is refused leaves no log
    threads = torch.get_num_threads()
    try:
        with _logged(plan.folder / LOG):
            (run or Run.open(plan.folder)).execute()
    finally:
        torch.set_num_threads(threads)  # the next run in this process may leave the number to torch


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Send this process's output to the end of a file; an error's traceback goes there as well."""
    with redirected(path):
        try:
            yield
        except MloError as error:
            print(f"error: {error}", file=sys.stderr)
            raise
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            raise
        except BaseException:
            traceback.print_exc()
            raise


@contextmanager
def redirected(path: Path) -> Iterator[None]:
    """Send what this process writes to standard output and error to the end of a file, native code's too."""
    streams = {1: sys.stdout, 2: sys.stderr}
    with path.open("ab") as file:
        for stream in streams.values():
            stream.flush()
        kept = {number: os.dup(number) for number in streams}
        for number in streams:
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            for number, stream in streams.items():
                stream.flush()
                os.dup2(kept[number], number)
                os.close(kept[number])


class _Told:
    """Tells how many of the runs are done: a live line in a terminal, a line for each run elsewhere."""

    def __init__(self, total: int, done: int) -> None:
        self._console = Console(stderr=True)
        self._total, self._done = total, done
        columns = TextColumn("[bold]runs"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn()
        last = TextColumn("{task.fields[last]}", markup=False)
        self._bar = Progress(*columns, last, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("", total=total, completed=done, last="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def done(self, plan: Planned, failure: Failure | None) -> None:
        """Tell of one run more."""
        self._done += 1
        said = f"{plan.folder.name}  FAILED: {failure.message}" if failure else plan.folder.name
        self._bar.update(self._task, completed=self._done, last=said.partition("\n")[0])
        if not self._console.is_terminal:
            self._console.print(f"{self._done}/{self._total}  {said}", soft_wrap=True, markup=False, highlight=False)
