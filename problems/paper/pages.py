"""The tables on the pages: results beside the paper's numbers, and paired tests between methods."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tabulate import tabulate

from mlo.reports.compare import paired
from problems.paper.reported_results import Reported, Row

LEVEL = 0.05
DIFFERENCES = (
    "Tables with a column of differences compare two methods, seed by seed. A negative difference means that the "
    'method has a lower error than the one in the column "against". The interval is a bootstrap interval of the mean '
    "difference, and p is that of an exact sign-flip permutation test."
)
Measures = Mapping[str, Any]
Seeds = Mapping[int, Measures]


class Comparison(NamedTuple):
    """Two labels whose errors are compared seed by seed."""

    label: str
    baseline: str


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation; a single value as it is."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def column(seeds: Seeds, measure: str) -> list[float]:
    """The values of a measure, in the order of the seeds; seeds without it are skipped."""
    return [float(seeds[seed][measure]) for seed in sorted(seeds) if measure in seeds[seed]]


def reported_error(reported: Reported | None) -> str:
    """The paper's error in percent, followed by the top-5 error after a slash if there is one."""
    if reported is None:
        return "-"
    error = f"{reported.error:.2f}" if reported.top5_error is None else f"{reported.error:.1f} / {reported.top5_error}"
    return error if reported.deviation is None else f"{error} ± {reported.deviation:.2f}"


def result_table(rows: Sequence[Row], found: Mapping[str, Seeds], scale: str) -> str:
    """A table in the paper's layout, with the numbers that the paper reports in the last columns."""
    unit, seconds, digits = ("CPU-seconds", 1, 0) if scale == "laptop" else ("GPU-days", 86400, 2)
    body = []
    for row in rows:
        seeds, reported = found[row.label], row.reported
        cost = [value / seconds for value in column(seeds, "search_seconds")]
        body.append(
            [
                row.label,
                spread(column(seeds, "test_error")),
                spread([value / 1e6 for value in column(seeds, "parameters")], 3),
                spread([value / 1e6 for value in column(seeds, "multiply_adds")], 1),
                spread(cost, digits) if any(cost) else "-",
                reported_error(reported),
                "-" if reported is None or reported.parameters is None else reported.parameters,
                "-" if reported is None or reported.cost is None else reported.cost,
            ]
        )
    head = ["method", "error, %", "weights, M", "multiply-adds, M", f"search, {unit}"]
    return markdown(body, [*head, "paper: error, %", "paper: weights, M", "paper: GPU-days"])


def comparison_table(comparisons: Sequence[Comparison], found: Mapping[str, Seeds]) -> str:
    """Paired differences of errors: their mean, its 95 % bootstrap interval, and a sign-flip permutation test."""
    body = []
    for label, baseline in comparisons:
        test = paired(*(_errors(found[name]) for name in (label, baseline)))
        estimates = [test.mean, test.low, test.high]
        mean, low, high = ("-" if value is None else f"{value:+.2f}" for value in estimates)
        body.append([label, baseline, mean, f"{low} to {high}", "-" if test.p is None else f"{test.p:.3f}", test.n])
    return markdown(body, ["method", "against", "difference of errors", "95 % interval", "p", "seeds"])


def verdict(comparisons: Sequence[Comparison], found: Mapping[str, Seeds]) -> str:
    """Say in words which of these differences are significant at 0.05, and in which direction."""
    tests = [(c, paired(_errors(found[c.label]), _errors(found[c.baseline]))) for c in comparisons]
    significant = [(c, test) for c, test in tests if test.p is not None and test.mean is not None and test.p <= LEVEL]
    findings = [f"{c.label} has a {'lower' if (test.mean or 0) < 0 else 'higher'} error" for c, test in significant]
    pairs = min(test.n for _, test in tests)
    text = f"p is at most {LEVEL} for {len(findings) or 'none'} of these {len(tests)} differences"
    text += f": {'; '.join(findings)}." if findings else "."
    if 2 / 2**pairs > LEVEL:
        text += f" With {pairs} seeds, p is at least {2 / 2**pairs:.2g}, so no single difference can be significant."
    return text + " With so few seeds, the bootstrap intervals are somewhat too narrow."


def seeds_table(labels: Sequence[str], found: Mapping[str, Seeds]) -> str:
    """A table of the error of every seed."""
    numbers = sorted({seed for label in labels for seed in found[label]})
    body = [
        [label, *(f"{found[label][n]['test_error']:.2f}" if n in found[label] else "-" for n in numbers)]
        for label in labels
    ]
    return markdown(body, ["error, %", *(f"seed {n}" for n in numbers)])


def markdown(body: Sequence[Sequence[Any]], head: Sequence[str]) -> str:
    """Format rows of text as a Markdown table."""
    return tabulate(body, head, tablefmt="github", disable_numparse=True)


def _errors(seeds: Seeds) -> dict[int, float]:
    return {seed: float(measures["test_error"]) for seed, measures in seeds.items()}
