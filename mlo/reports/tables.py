"""A comparison as a table (text, Markdown, LaTeX), as CSV of single runs, and as a plot."""

import csv
import io
import math
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from shutil import get_terminal_size

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from mlo.errors import ConfigError
from mlo.options import registry
from mlo.reports.compare import (
    MIN_PAIRS,
    Group,
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
WIDTH = 100


def table(
    compared: Sequence[Group], measure: str | None = None, baseline: str | None = None, form: str = "text"
) -> str:
    """Each group's measures as mean ± standard deviation over seeds, and its difference from the baseline.

    Text fits the terminal, or 100 columns if there is none: in a table that is too wide, columns with the same value in
    all rows move to a line below it, and labels are wrapped; if it is still too wide, each row becomes a block of
    lines. The other forms are always whole.

    CSV contains the single numbers: a line for each row of each run's results, with columns for the row's name ("row"),
    each option in which the runs differ ("option.NAME"), the seed, and each measure (named "measure.NAME" if another
    column has that name).

    Args:
        compared: from :func:`mlo.reports.compare.groups`.
        measure: the measure to show differences of; the first one by default.
        baseline: label of the group that the others are compared with; the first one by default.
        form: text, markdown, latex or csv.

    Raises:
        ConfigError: if there is no such measure, label or form, or if a measure or baseline is given for csv, which
            has no differences.
    """
    if form not in FORMATS:
        raise ConfigError(f"--format: {registry.unknown(form, FORMATS, 'among the formats')}")
    if form == "csv":
        for option, given in (("--measure", measure), ("--baseline", baseline)):
            if given is not None:
                raise ConfigError(f"{option}: csv has no differences, only each run's numbers; use {', '.join(STYLES)}")
        return _csv(compared)
    measure, base = chosen_measure(compared, measure), chosen_baseline(compared, baseline)
    names = measures(compared)
    head = ["", "seeds", *names]
    rows = [[group.label, str(len(group.seeds)), *(_cell(group, name) for name in names)] for group in compared]
    if len(compared) > 1:
        head += [f"{measure}: difference", "95 % interval", "p", "pairs"]
        for row, group in zip(rows, compared, strict=True):
            row += _difference(group, base, measure)
    if form == "markdown":
        head, *rows = ([cell.replace("|", "\\|") for cell in row] for row in [head, *rows])
    if form == "text":
        return _fitted(rows, head, measure, get_terminal_size((WIDTH, 24)).columns)
    text = _text(rows, head, STYLES[form])
    return text.replace("±", "$\\pm$") if form == "latex" else text


def _fitted(rows: Sequence[Sequence[str]], head: Sequence[str], measure: str, width: int) -> str:
    """A text table that is at most ``width`` columns wide, unless a single word is wider.

    Args:
        rows: the cells; the first one is the row's label.
        head: the names of the columns.
        measure: the column that stays even if it has the same value in all rows.
        width: the number of columns of the terminal.
    """
    whole = _text(rows, head)
    if _width(whole) <= width:
        return whole
    columns = list(zip(head, *rows, strict=True))
    alike = [column for column in columns if column[0] != measure and len({*column[1:]}) == 1 < len(rows)]
    shared = ", ".join(f"{name} {cell}" for name, cell, *_ in alike if cell != NOTHING)
    note = f"\n{_wrap(f'the same in all rows: {shared}', width, indent='')}\n" if shared else ""
    head, *rows = zip(*(column for column in columns if column not in alike), strict=True)
    room = max(len(label) for label, *_ in rows) + width - _width(_text(rows, head))
    wrapped = _text([[_wrap(label, max(1, room)), *cells] for label, *cells in rows], head)
    if _width(wrapped) <= width:
        return wrapped + note
    blocks = []
    for label, *cells in rows:
        lines = _text(list(zip(head[1:], cells, strict=True)), (), "plain")
        blocks.append(f"{_wrap(label, width)}\n{textwrap.indent(lines, '    ')}")
    return "\n".join(blocks) + note


def _text(rows: Sequence[Sequence[str]], head: Sequence[str], style: str = STYLES["text"]) -> str:
    return tabulate(rows, head, tablefmt=style, disable_numparse=True) + "\n"


def _width(text: str) -> int:
    return max(map(len, text.splitlines()))


def _wrap(text: str, width: int, indent: str = "  ") -> str:
    return textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


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
    places = max(
        0, 1 - math.floor(math.log10(deviation))
    )  # two digits of the deviation, and the mean to the same place
    return f"{mean:.{places}f} ± {deviation:.{places}f}"


def shown(number: float) -> str:
    """A number with four digits; a whole number with all of its digits."""
    return str(int(number)) if number == int(number) and abs(number) < 1e15 else f"{number:.4g}"


def _difference(group: Group, base: Group, measure: str) -> list[str]:
    if group is base:
        return ["baseline", NOTHING, NOTHING, NOTHING]
    found = paired(group.values(measure), base.values(measure))
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
    """Plot a measure: a point for each seed, the mean and its 95 % interval.

    If the runs differ in a single option and it is a number, it is the horizontal axis, and each row of the results is
    a line.

    Raises:
        ConfigError: if the file's name does not end in .png, .svg or .pdf, or there is no such measure.
    """
    if path.suffix not in PICTURES:
        raise ConfigError(f"{path}: unknown kind of picture; use a name that ends in {', '.join(PICTURES)}")
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
    """The mean at each place, and its interval if there are enough values."""
    held = [(place, found) for place, found in zip(places, values, strict=True) if found]
    means = np.array([statistics.fmean(found) for _, found in held])
    ends = np.array([interval(found) if len(found) >= MIN_PAIRS else (np.nan, np.nan) for _, found in held])
    errors = np.abs(ends.reshape(-1, 2).T - means)
    axes.errorbar([place for place, _ in held], means, errors, fmt=f"D{line}", color=color, capsize=4, label=label)
