"""Comparison of finished runs: means over seeds, and differences from a baseline, paired by seed."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from mlo.errors import ConfigError
from mlo.options import registry
from mlo.options.yaml_options import flat, of_any_seed, read_yaml
from mlo.runs.folder import read_results, run_info
from mlo.runs.job import Results

MIN_PAIRS = 3
CONFIDENCE = 0.95
RESAMPLES = 9999
EXACT_UP_TO = 16


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        path: its folder.
        options: every option except the seed, by its dotted name; and `job`, the job's registered name. In paths that
            sweeps and experiments write, the seed is replaced by *, so that runs which use a file of another run with
            the same seed are grouped over seeds.
        seed: its seed.
        rows: {row: {measure: number or text}}, as the job returned it.
    """

    path: Path
    options: Mapping[str, Any]
    seed: int
    rows: Results


@dataclass(frozen=True)
class Group:
    """One row of the results, of runs that differ only in the seed.

    Attributes:
        row: the row's name in the results.
        options: the options in which the compared runs differ.
        seeds: {seed: {measure: number or text}}.
    """

    row: str
    options: Mapping[str, Any]
    seeds: Mapping[int, Mapping[str, float | str]]

    @property
    def label(self) -> str:
        """The row's name, and `option=value` for each option in which the runs differ."""
        options = [f"{name.removesuffix('.kind')}={written(value)}" for name, value in self.options.items()]
        return ", ".join([self.row, *options])

    def values(self, measure: str) -> dict[int, float]:
        """{seed: value} of a measure where it is a number."""
        found = {seed: measures.get(measure) for seed, measures in self.seeds.items()}
        return {seed: value for seed, value in found.items() if isinstance(value, int | float)}


@dataclass(frozen=True)
class Paired:
    """The difference a - b, paired by seed.

    Attributes:
        mean: mean difference; None without a common seed.
        low, high: its 95 % bootstrap interval; None with fewer than three pairs.
        p: p-value of a two-sided sign-flip permutation test; None with fewer than three pairs.
        n: number of common seeds.
    """

    mean: float | None
    low: float | None
    high: float | None
    p: float | None
    n: int


def load(folders: Iterable[Path]) -> list[Result]:
    """The finished runs in the folders and anywhere below them; unfinished ones are reported and left out.

    Raises:
        ConfigError: if there is no finished run, or a file of one cannot be read.
    """
    results: list[Result] = []
    names = [str(folder) for folder in folders]
    for path in dict.fromkeys(path for name in names for path in _runs(Path(name))):
        rows = read_results(path)
        if rows is None:
            print(f"note: {path} is not finished, so it is left out", file=sys.stderr)
            continue
        options = flat(read_yaml(path / "config.yaml"))
        seed = options.pop("seed", 0)
        options = {name: of_any_seed(value, seed) for name, value in options.items()}
        results.append(Result(path, {"job": run_info(path).job, **options}, seed, rows))
    if not results:
        raise ConfigError(f"{', '.join(names)}: no finished run; finish a stopped one with `mlo resume RUN_DIR`")
    return results


def _runs(folder: Path) -> list[Path]:
    found = sorted(file.parent for file in folder.rglob("run.json"))
    if not found:
        raise ConfigError(f"{folder}: no run folder there; give a run folder, or a folder that contains run folders")
    return found


def groups(results: Sequence[Result]) -> list[Group]:
    """The rows of all results in order, grouped over runs that differ only in the seed."""
    names = _differing(results)
    found: dict[tuple[str, str], tuple[dict[str, Any], dict[int, Mapping[str, float | str]]]] = {}
    for result in results:
        options = {name: result.options[name] for name in names if name in result.options}
        for row, measures in result.rows.items():
            seeds = found.setdefault((row, repr(options)), (options, {}))[1]
            if result.seed in seeds:
                print(
                    f"note: {result.path} is left out, since another run has the same options and seed", file=sys.stderr
                )
                break
            seeds[result.seed] = measures
    return [Group(row, options, seeds) for (row, _), (options, seeds) in found.items()]


def _differing(results: Sequence[Result]) -> list[str]:
    """Names of the options in which runs differ; options below a `kind` are compared among runs of the same kind."""
    names = dict.fromkeys(name for result in results for name in result.options)
    return [name for name in names if _differs(name, results)]


def _differs(name: str, results: Sequence[Result]) -> bool:
    parts = name.split(".")
    kinds = [".".join([*parts[:length], "kind"]) for length in range(1, len(parts))]
    values: dict[tuple[str, ...], set[str]] = {}
    for result in results:
        family = tuple(str(result.options.get(kind)) for kind in kinds if kind != name)
        values.setdefault(family, set()).add(repr(result.options.get(name)))
    return any(len(different) > 1 for different in values.values())


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Paired:
    """The difference ``a - b`` of two {seed: value}, over their common seeds.

    The interval is a percentile bootstrap of the mean difference, with a fixed random seed. The test flips the signs of
    the differences in all ways up to 16 pairs, and in 65,536 random ways beyond. If the values of both are the same for
    all seeds, there is really only one pair, so there is no interval and no p-value.
    """
    differences = np.array([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())], dtype=float)
    n = len(differences)
    mean = float(differences.mean()) if n else None
    alike = all(len({side[seed] for seed in a.keys() & b.keys()}) == 1 for side in (a, b))
    if n < MIN_PAIRS or alike:
        return Paired(mean, None, None, None, n)
    low, high = interval(differences)
    test = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=2**EXACT_UP_TO,
        batch=4096,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return Paired(mean, low, high, float(test.pvalue), n)


def interval(values: Iterable[float]) -> tuple[float, float]:
    """A 95 % percentile bootstrap interval of the mean of at least three values, with a fixed random seed."""
    found = stats.bootstrap(
        (np.array(list(values), dtype=float),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def measures(compared: Sequence[Group]) -> list[str]:
    """Names of the measures that are numbers, in the order of their first appearance."""
    names = dict.fromkeys(name for group in compared for found in group.seeds.values() for name in found)
    return [name for name in names if any(group.values(name) for group in compared)]


def chosen_measure(compared: Sequence[Group], measure: str | None) -> str:
    """The measure of that name, or the first one if no name is given; ConfigError if there is no such measure."""
    names = measures(compared)
    if not names:
        raise ConfigError("the results of these runs contain no numbers, so there is nothing to compare")
    if measure is not None and measure not in names:
        raise ConfigError(f"--measure: {registry.unknown(measure, names, 'among the measures of these runs')}")
    return measure or names[0]


def chosen_baseline(compared: Sequence[Group], label: str | None) -> Group:
    """The group of that label, or the first one if no label is given; ConfigError if there is no such group."""
    found = {group.label: group for group in compared}
    if label is not None and label not in found:
        valid = "; ".join(found)
        guess = registry.nearest(label, found)
        hint = f"did you mean {guess!r}? " if guess else ""
        raise ConfigError(f"--baseline: {label!r} is not a label of these runs; {hint}the labels are: {valid}")
    return found[label] if label is not None else compared[0]


def written(value: Any) -> str:
    """An option's value as a user writes it."""
    return value if isinstance(value, str) else json.dumps(value, default=str).replace('"', "")


def is_number(value: object) -> bool:
    """Whether an option's value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)
