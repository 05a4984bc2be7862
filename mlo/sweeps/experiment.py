"""Experiments: runs that together answer a question, done with one command, and the pages written from them."""

import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from mlo.errors import ConfigError, MloError
from mlo.options import registry
from mlo.runs.cost import estimate_seconds
from mlo.runs.job import Job, Results
from mlo.runs.run import read_results
from mlo.sweeps.grid import Failure, Planned, check, redirected, run_all
from mlo.sweeps.workers import Failed, in_processes

PAGES = "pages"


class Wanted(NamedTuple):
    """A run that an experiment needs, but for its seed.

    Attributes:
        job: the registered name of its job.
        options: of the job, without the seed.
        uses: {option: (key of another run, a file in the folder of its run with the same seed)}; that run comes first,
            and the option's value is the path of the file.
    """

    job: str
    options: Mapping[str, Any]
    uses: Mapping[str, tuple[str, str]] = {}


class Experiment(ABC):
    """Derive from it and register the class in `mlo.experiments`; `mlo reproduce NAME` runs it.

    The first line of the class's docstring is what `mlo list` says of it.

    Attributes:
        scales: {scale: its usual number of seeds}, such as {"small": 3, "full": 10}; the first is the default.
    """

    scales: ClassVar[Mapping[str, int]]

    @abstractmethod
    def runs(self, scale: str) -> Mapping[str, Wanted | tuple[str, Mapping[str, Any]]]:
        """{key: what is wanted, or just (job, options)}; a key is a name that a folder can have.

        Equal keys of different experiments mean the same run, which is done once.
        """

    @abstractmethod
    def write(self, scale: str, results: Mapping[str, Mapping[int, Results]], folder: Path) -> list[Path]:
        """Write pages and pictures from {key: {seed: what the job found}} into a folder; returns their paths."""


def load_experiment(name: str) -> Experiment:
    """The experiment registered under a name.

    Raises:
        ConfigError: if there is none, or it is no subclass of Experiment.
    """
    return registry.load_class(registry.EXPERIMENTS, name, Experiment)()  # type: ignore[type-abstract]


def chosen_scale(experiment: Experiment, name: str | None) -> str:
    """The scale to run at: the first where none is named; ConfigError if there is none of that name."""
    if name is not None and name not in experiment.scales:
        raise ConfigError(f"--scale: {registry.unknown(name, experiment.scales, 'among the scales')}")
    return name or next(iter(experiment.scales))


def _wanted(experiment: Experiment, scale: str) -> dict[str, Wanted]:
    return {key: Wanted(*entry) for key, entry in experiment.runs(scale).items()}


def plan(experiment: Experiment, scale: str, seeds: int, output: Path) -> dict[str, list[Planned]]:
    """{key: its runs, seed by seed}, in OUTPUT/SCALE/KEY/seed-N; those that use others come after all that do not."""
    planned: dict[str, list[Planned]] = {}
    wanted = _wanted(experiment, scale)
    for key, (job, options, uses) in sorted(wanted.items(), key=lambda item: bool(item[1].uses)):
        if not re.fullmatch(r"\w[\w.,=+-]*", key) or key == PAGES:
            raise ConfigError(f"the experiment's key {key!r} cannot name a folder; use letters, digits and .,=+-_")
        strange = [other for other, _ in uses.values() if other not in wanted or wanted[other].uses]
        if strange:
            raise ConfigError(f"the experiment's {key!r} uses {strange[0]!r}, which is no run of it that uses no other")
        planned[key] = []
        for seed in range(seeds):
            # absolute: the same run, however the output is spelled
            used = {o: output.absolute() / scale / other / f"seed-{seed}" / file for o, (other, file) in uses.items()}
            files = {option: str(path) for option, path in used.items()}
            made = Planned(output / scale / key / f"seed-{seed}", job, {**options, **files, "seed": seed})
            planned[key].append(made)
    check([run for runs in planned.values() for run in runs], there=False)
    return planned


def do(
    experiment: Experiment, scale: str, planned: Mapping[str, Sequence[Planned]], workers: int, one_core_each: bool
) -> list[Failure]:
    """Have the runs finished that use no other, and then those that do and whose files are there; returns the failures.

    A run whose files are not there, for the run that makes them failed, is not begun, and is a failure too.

    Raises:
        ConfigError, KeyboardInterrupt: as :func:`mlo.sweeps.grid.run_all`.
    """
    wanted = _wanted(experiment, scale)
    failures = run_all([r for key in planned if not wanted[key].uses for r in planned[key]], workers, one_core_each)
    ready: list[Planned] = []
    for run, uses in ((run, wanted[key].uses) for key in planned if wanted[key].uses for run in planned[key]):
        absent = [run.options[option] for option in uses if not Path(run.options[option]).exists()]
        if absent and not run.finished():
            failures.append(
                Failure(run.folder, f"not begun, for {absent[0]} is not there: the run that makes it failed")
            )
        else:
            ready.append(run)
    return failures + run_all(ready, workers, one_core_each)


def standing(runs: Sequence[Planned]) -> str:
    """How many of the runs are finished, begun and to be done, in words."""
    finished = sum(run.finished() for run in runs)
    begun = sum(run.begun() for run in runs) - finished
    return f"{len(runs)} runs, {finished} finished, {begun} begun, {len(runs) - finished - begun} not begun"


@dataclass(frozen=True)
class Cost:
    """What runs will cost, by rehearsals.

    Attributes:
        seconds: wall-clock time of all together.
        processes: how many run at a time.
        core_seconds: time of all cores together.
        cuda: whether they run on a card, which the processes share.
    """

    seconds: float
    processes: int
    core_seconds: float
    cuda: bool

    def __str__(self) -> str:
        many = f"{self.processes} process{'es' * (self.processes > 1)}"
        number, unit = (self.seconds / 86400, "GPU-days") if self.cuda else (self.core_seconds / 3600, "CPU-hours")
        paid = f"{number:.0f} {unit}" if number >= 10 else f"{max(number, 0.01):.2g} {unit}"
        return f"about {duration(self.seconds)} on {many} ({paid})"


def cost(left: Mapping[str, Sequence[Planned]], workers: int, one_core_each: bool) -> Cost:
    """Measure what the runs {key: those that are left} will cost, by a few rounds of one run of each key.

    Raises:
        MloError: if a rehearsal fails, as the run would.
        KeyboardInterrupt: if a SIGINT or SIGTERM came.
    """
    firsts = [runs[0] for runs in left.values() if runs]
    counts = {runs[0].folder: len(runs) for runs in left.values() if runs}
    total = cores = longest = 0.0
    cuda = False
    for run, measured in in_processes(_rehearsed, firsts, workers, one_core_each):
        if isinstance(measured, Failed):
            raise MloError(f"{run.folder.parent.name}: its rehearsal failed: {measured.message}")
        count = counts[run.folder]
        total += count * measured.seconds
        cores += count * measured.seconds * (1 if one_core_each else measured.threads)
        longest = max(longest, measured.seconds)
        cuda = cuda or measured.cuda
    processes = max(1, min(workers, sum(counts.values())))
    return Cost(max(total / processes, longest), processes, cores, cuda)


@dataclass(frozen=True)
class _Measured:
    seconds: float
    threads: int
    cuda: bool


def _rehearsed(run: Planned) -> _Measured:
    job = run.made()
    with redirected(Path(os.devnull)):
        seconds = estimate_seconds(job)
    return _Measured(seconds, job.threads or torch.get_num_threads(), _on_card(job))


def _on_card(job: Job) -> bool:
    return torch.cuda.is_available() if job.device == "auto" else job.device.startswith("cuda")


def duration(seconds: float) -> str:
    """A time in words: `40 s`, `2 h 40 min`, `3 days 2 h`."""
    if seconds < 60:
        return f"{max(1, math.ceil(seconds))} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    words = [f"{days} day{'s' * (days > 1)}" * (days > 0), f"{hours} h" * (hours > 0), f"{minutes} min" * (minutes > 0)]
    return " ".join([word for word in words if word][:2])


def write(experiment: Experiment, name: str, scale: str, planned: Mapping[str, Sequence[Planned]]) -> list[Path]:
    """Write the experiment's pages from its finished runs; returns their paths.

    Raises:
        ConfigError: if a run is not finished.
    """
    results: dict[str, dict[int, Results]] = {}
    for key, runs in planned.items():
        for run in runs:
            found = read_results(run.folder)
            if found is None:
                raise ConfigError(f"{run.folder}: is not finished, so no page is written from it")
            results.setdefault(key, {})[run.options["seed"]] = found
    folder = next(run.folder for runs in planned.values() for run in runs).parents[1] / PAGES / name
    folder.mkdir(parents=True, exist_ok=True)
    return experiment.write(scale, results, folder)
