"""Experiments: runs that together answer a question, and the pages written from their results."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from mlo.errors import ConfigError
from mlo.options import registry
from mlo.runs.folder import read_results
from mlo.runs.job import Results
from mlo.sweeps.grid import Planned, check

PAGES = "pages"


class Wanted(NamedTuple):
    """A run that an experiment needs, without its seed.

    Attributes:
        job: the registered name of its job.
        options: the job's options, without the seed.
        uses: {option: (key of another run, name of a file)}: the other run with the same seed is done first, and the
            option's value is the path of that file in its folder.
    """

    job: str
    options: Mapping[str, Any]
    uses: Mapping[str, tuple[str, str]] = {}


class Experiment(ABC):
    """Derive from it and register the class in `mlo.experiments`; `mlo reproduce NAME` runs it.

    `mlo list` shows the first line of the class's docstring.

    Attributes:
        scales: {scale: default number of seeds}, such as {"small": 3, "full": 10}; the first scale is the default.
    """

    scales: ClassVar[Mapping[str, int]]

    @abstractmethod
    def runs(self, scale: str) -> Mapping[str, Wanted | tuple[str, Mapping[str, Any]]]:
        """{key: the run, or just (job, options)}; the key names the run's folder.

        If two experiments use the same key, they share that run, and it is done once.
        """

    @abstractmethod
    def write(self, scale: str, results: Mapping[str, Mapping[int, Results]], folder: Path) -> list[Path]:
        """Write pages and pictures from {key: {seed: results of the job}} into a folder; returns their paths."""


def load_experiment(name: str) -> Experiment:
    """The experiment registered under a name.

    Raises:
        ConfigError: if there is none, or it is no subclass of Experiment.
    """
    return registry.load_class(registry.EXPERIMENTS, name, Experiment)()  # type: ignore[type-abstract]


def chosen_scale(experiment: Experiment, name: str | None) -> str:
    """The scale of that name, or the first one if no name is given; ConfigError if there is no such scale."""
    if name is not None and name not in experiment.scales:
        raise ConfigError(f"--scale: {registry.unknown(name, experiment.scales, 'among the scales')}")
    return name or next(iter(experiment.scales))


def plan(experiment: Experiment, scale: str, seeds: int, output: Path) -> dict[str, list[Planned]]:
    """{key: its runs, one for each seed}, in OUTPUT/SCALE/KEY/seed-N; runs that use files of others come last.

    Raises:
        ConfigError: with everything that is wrong with the runs (see :func:`mlo.sweeps.grid.check`).
    """
    planned: dict[str, list[Planned]] = {}
    wanted = {key: Wanted(*entry) for key, entry in experiment.runs(scale).items()}
    for key, (job, options, uses) in sorted(wanted.items(), key=lambda item: bool(item[1].uses)):
        if not re.fullmatch(r"\w[\w.,=+-]*", key) or key == PAGES:
            raise ConfigError(f"the experiment's key {key!r} cannot name a folder; use letters, digits and .,=+-_")
        unusable = [other for other, _ in uses.values() if other not in wanted or wanted[other].uses]
        if unusable:
            raise ConfigError(
                f"the experiment's {key!r} uses a file of {unusable[0]!r}; "
                "name a run of this experiment that uses no files of others"
            )
        planned[key] = []
        for seed in range(seeds):
            # absolute paths, so that the options are the same whether the output is given as absolute or relative
            used = {o: output.absolute() / scale / other / f"seed-{seed}" / file for o, (other, file) in uses.items()}
            values = {**options, **{option: str(path) for option, path in used.items()}, "seed": seed}
            planned[key].append(Planned(output / scale / key / f"seed-{seed}", job, values, tuple(uses)))
    check([run for runs in planned.values() for run in runs])
    return planned


def status(runs: Sequence[Planned]) -> str:
    """How many of the runs are finished, started and not started, in words."""
    finished = sum(run.finished() for run in runs)
    started = sum(run.started() for run in runs) - finished
    return f"{len(runs)} runs: {finished} finished, {started} started, {len(runs) - finished - started} not started"


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
                raise ConfigError(f"{run.folder}: the run is not finished, so no pages are written")
            results.setdefault(key, {})[run.options["seed"]] = found
    folder = next(run.folder for runs in planned.values() for run in runs).parents[1] / PAGES / name
    folder.mkdir(parents=True, exist_ok=True)
    return experiment.write(scale, results, folder)
