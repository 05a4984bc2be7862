"""A comparison written out: as text, Markdown or LaTeX, run by run as CSV, and drawn."""

import csv
import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from mlo.errors import ConfigError
from mlo.options import registry
from mlo.reports.compare import (
    MIN_PAIRS,
    Group,
    Paired,
    chosen_baseline,
    chosen_measure,
    interval,
    is_number,
    measures,
    paired,
    written,
)

STYLES = {"text": "simple", "markdown": "pipe", "latex": "latex_booktabs"}
FORMATS = (*STYLES, "csv")
PICTURES = (".png", ".svg", ".pdf")
NOTHING = "-"


def table(
    compared: Sequence[Group], measure: str | None = None, baseline: str | None = None, form: str = "text"
) -> str:
    """Each group's measures as mean ± standard deviation over seeds, and its difference from the baseline.

    As CSV it is the numbers that these are made of: a line for each row of each run's results, and a column for the
    row's name ("row"), each option in which the runs differ ("option.NAME"), the seed, and each measure
    ("measure.NAME" where another column has its name).

    Args:
        compared: as :func:`mlo.reports.compare.groups` makes them.
        measure: whose differences are told; the first one by default.
        baseline: label of the group that differences are from; the first one by default.
        form: text, markdown, latex or csv.

    Raises:
        ConfigError: if there is no such measure, label or form, or one is named for csv, which has no differences.
    """
    if form not in FORMATS:
        raise ConfigError(f"--format: {registry.unknown(form, FORMATS, 'among the formats')}")
    if form == "csv":
        for option, given in (("--measure", measure), ("--baseline", baseline)):
            if given is not None:
                raise ConfigError(f"{option}: csv has each run's numbers, and no differences; take {', '.join(STYLES)}")
        return _csv(compared)
    measure, base = chosen_measure(compared, measure), chosen_baseline(compared, baseline)
    names = measures(compared)
    differences = [None if group is base else paired(group.values(measure), base.values(measure)) for group in compared]
    head = ["", "seeds", *names]
    rows = [[group.label, str(len(group.seeds)), *(_cell(group, name) for name in names)] for group in compared]
    if len(compared) > 1:
        head += [f"{measure}: difference", "95 % interval", "p", "pairs"]
        for row, found in zip(rows, differences, strict=True):
            row += _difference(found) if found else ["baseline", NOTHING, NOTHING, NOTHING]
    if form == "markdown":
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        head = [cell.replace("|", "\\|") for cell in head]
    text = tabulate(rows, head, tablefmt=STYLES[form], disable_numparse=True)
    return (text.replace("±", "$\\pm$") if form == "latex" else text) + "\n"


def _cell(group: Group, measure: str) -> str:
    values = [*group.values(measure).values()]
    if not values:
        return NOTHING
    text = _mean_and_deviation(values)
    return text if len(values) == len(group.seeds) else f"{text} ({len(values)} seeds)"


def _mean_and_deviation(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    if len(values) == 1:
        return shown(mean)
    deviation = statistics.stdev(values)
    if not 1e-6 <= deviation < math.inf:
        return f"{shown(mean)} ± {shown(deviation)}"
    places = max(0, 1 - math.floor(math.log10(deviation)))  # two digits of the deviation, and the mean to match
    return f"{mean:.{places}f} ± {deviation:.{places}f}"


def shown(number: float) -> str:
    """A number to four digits, a whole one as it is."""
    return str(int(number)) if number == int(number) and abs(number) < 1e15 else f"{number:.4g}"


def _difference(found: Paired) -> list[str]:
    mean = NOTHING if found.mean is None else f"{found.mean:+.3g}"
    if found.low is None or found.high is None or found.p is None:
        return [mean, NOTHING, NOTHING, f"{found.n} (fewer than {MIN_PAIRS})"]
    return [mean, f"[{found.low:+.3g}, {found.high:+.3g}]", f"{found.p:.2g}", str(found.n)]


def _csv(compared: Sequence[Group]) -> str:
    options = list(dict.fromkeys(name for group in compared for name in group.options))
    names = list(dict.fromkeys(name for group in compared for found in group.seeds.values() for name in found))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["row", *(f"option.{name}" for name in options), "seed"]
    writer.writerow([*head, *(f"measure.{name}" if name in head else name for name in names)])
    for group in compared:
        chosen = [written(group.options[name]) if name in group.options else None for name in options]
        for seed, found in sorted(group.seeds.items()):
            writer.writerow([group.row, *chosen, seed, *map(found.get, names)])
    return text.getvalue()


def draw(compared: Sequence[Group], path: Path, measure: str | None = None) -> None:
    """Draw a measure: a point for each seed, the mean and its 95 % interval.

    Where the runs differ in one option, a number, it is the horizontal axis, with a line for each row of the results.

    Raises:
        ConfigError: if the file's name ends in none of .png, .svg and .pdf, or there is no such measure.
    """
    if path.suffix not in PICTURES:
        raise ConfigError(f"{path}: a picture's name ends in {', '.join(PICTURES)}")
    measure = chosen_measure(compared, measure)
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    names = {name for group in compared for name in group.options}
    if len(names) == 1 and all(is_number(value) for group in compared for value in group.options.values()):
        _curves(axes, compared, measure, names.pop())
    else:
        _columns(axes, compared, measure)
    axes.set_ylabel(measure)
    figure.savefig(path, dpi=150)


def _columns(axes: Axes, compared: Sequence[Group], measure: str) -> None:
    for place, group in enumerate(compared):
        values = [*group.values(measure).values()]
        axes.plot([place] * len(values), values, "o", color="0.7", markersize=4)
        _mean(axes, [place], [values], color=f"C{place % 10}")
    axes.set_xticks(range(len(compared)), [group.label.replace(", ", "\n") for group in compared])
    axes.set_xlim(-0.5, len(compared) - 0.5)


def _curves(axes: Axes, compared: Sequence[Group], measure: str, option: str) -> None:
    for index, row in enumerate(dict.fromkeys(group.row for group in compared)):
        line = sorted((group for group in compared if group.row == row), key=lambda group: group.options[option])
        places = [group.options[option] for group in line]
        values = [[*group.values(measure).values()] for group in line]
        for place, found in zip(places, values, strict=True):
            axes.plot([place] * len(found), found, "o", color=f"C{index % 10}", alpha=0.3, markersize=4)
        _mean(axes, places, values, color=f"C{index % 10}", line="-", label=row)
    axes.set_xlabel(option)
    axes.legend()


def _mean(
    axes: Axes,
    places: Sequence[float],
    values: Sequence[Sequence[float]],
    color: str,
    line: str = "",
    label: str | None = None,
) -> None:
    """The mean at each place; its interval where there are values enough."""
    held = [(place, found) for place, found in zip(places, values, strict=True) if found]
    means = np.array([statistics.fmean(found) for _, found in held])
    ends = np.array([interval(found) if len(found) >= MIN_PAIRS else (np.nan, np.nan) for _, found in held])
    errors = np.abs(ends.reshape(-1, 2).T - means)
    axes.errorbar([place for place, _ in held], means, errors, fmt=f"D{line}", color=color, capsize=4, label=label)
