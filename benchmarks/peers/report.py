"""Writes the rows as a page of Markdown. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.peers.catalogue import ESTIMATORS, LIBRARIES, REFERENCES, TITLES, WORKLOADS, Case

Row = Mapping[str, Any]
Rows = Mapping[Case, Row]

HEADINGS = {
    "one_step": "One step, exact product",
    "darts": "One step, central difference (DARTS)",
    "cg": "Conjugate gradient, 10 iterations",
    "neumann": "Neumann series, 10 terms",
    "unrolled": "Unrolled",
    "kept": "Unrolled, with memory for the graphs of all steps",
    "product": "One exact curvature product, by itself",
    "recomputed": "Unrolled, each step's graph built again on the way back",
}

COMPARED_WITH = {
    "one_step": "float64 autograd through the step",
    "unrolled": "float64 autograd through all steps",
    "product": "forward over reverse in float64",
    "cg": "ten iterations in float64, by a Krylov basis and a direct solve",
    "neumann": "ten terms in float64, by forward over reverse",
}

TIME_TARGETS = {"mwn": 1.05, "clean512": 1.05, "clean8192": 1.05, "lbt": 1.05, "tiny": 1.1}
MEMORY_TARGET = 120.0
LBT_TARGET = 1.5
COMPILED_TARGETS = {"clean512": 0.95, "tiny": 0.45}
PRODUCT_TARGET = 0.7

HEAD = """# Benchmarks beside other libraries

Made by `python -m benchmarks.peers` ([how it measures](../benchmarks/README.md)) with torch {torch} and Python
{python} on one thread of an {cpu}; mlo at {revision}.

- **time**: CPU time over that of the hand-written loop of the same estimator, the two run in turn in one process; the
  median of the pairs, with the quartiles. "Itself" is that loop measured as if it were a library: how far from 1.00
  noise alone goes. The milliseconds are of the library's own blocks; rows were measured at different times, so compare
  the ratios of rows, and not these.
- **error**: relative error of the first hypergradient, in float32, against plain autograd in float64; **cosine** of
  the angle between the two.
- **peak**: memory of a fresh process over one that imports torch, makes the data and steps an optimizer ({baseline}
  MB), the library's own import included; absolute in brackets. Freed blocks go back to the system at once; **default**
  is the same with malloc as it is, which keeps them, and says how much of the heap ends up as holes.

Betty's `darts` leaves out the learning rate and takes its difference after the step, and its `cg` as released is not
conjugate gradient: their times are of something cheaper or else, as their errors show.

"The fastest peer" is met where mlo, compiled or not, takes less time. A + after a revision: with changes that were not
committed.
"""


def page(rows: Rows, machine: Mapping[str, str]) -> str:
    """The whole page."""
    torch = next((row["torch"] for row in rows.values() if "torch" in row), "?")
    baselines = [row["baseline_mb"] for row in rows.values() if "baseline_mb" in row] or [0.0]
    baseline = f"{min(baselines):.0f} to {max(baselines):.0f}"
    revisions = sorted({row["revision"] for row in rows.values() if row.get("revision")})
    head = HEAD.format(
        torch=torch, baseline=baseline, revision=", ".join(revisions) or "an unknown revision", **machine
    )
    parts = [head, *_targets(rows)]
    for workload, title in WORKLOADS.items():
        tables = [t for e in ESTIMATORS[workload] if (t := _table(rows, workload, e))]
        if tables:
            parts += [f"## {title}\n", *tables]
    return "\n".join(parts)


def line(row: Row) -> str:
    """One line about a row, to print after its measurement."""
    if "failed" in row:
        return str(row["failed"])
    memory = f", {row['peak_mb'] - row['baseline_mb']:.0f} MB over {row['baseline_mb']:.0f}" if "peak_mb" in row else ""
    return f"{row['ratio']:.2f}x of {row['hand_milliseconds']:.2f} ms, error {row['error']:.1e}{memory}"


def _table(rows: Rows, workload: str, estimator: str) -> str:
    found = {c.library: r for c, r in rows.items() if (c.workload, c.estimator) == (workload, estimator)}
    if not found:
        return ""
    against = COMPARED_WITH[REFERENCES[estimator]]
    lines = [f"### {HEADINGS[estimator]}\n", f"Error against {against}.\n"]
    lines += ["| | time | ms | error | cosine | peak, MB | default |", "| --- | --- | --- | --- | --- | --- | --- |"]
    lines += [f"| {TITLES[lib]} | {_cells(lib, estimator, found[lib])} |" for lib in LIBRARIES if lib in found]
    return "\n".join([*lines, ""])


def _cells(library: str, estimator: str, row: Row) -> str:
    if "failed" in row:
        return f"`{row['failed'][:90]}` | | | | |" if ":" in row["failed"] else f"{row['failed']} | | | | |"
    low, high = row["quartiles"]
    ratio = f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"
    if library == "hand":
        unroll = estimator == "recomputed"
        ratio = f"1.00; {row['ratio']:.2f} of the unroll" if unroll else f"1.00 (itself: {row['ratio']:.2f})"
    if "compile_seconds" in row:
        of = " of the unroll" if estimator == "recomputed" else ""
        ratio += f"{of}; {row['compile_seconds']:.0f} s to compile"
    measured = f"{ratio} | {row['milliseconds']:.2f} | {row['error']:.1e} | {row['cosine']:.4f}"
    if "peak_mb" not in row:
        return f"{measured} | | "
    over = row["peak_mb"] - row["baseline_mb"]
    return f"{measured} | {over:.0f} ({row['peak_mb']:.0f}) | {row['default_over_mb']:.0f}"


def _targets(rows: Rows) -> Iterator[str]:
    """A table of the targets for mlo, and which are met."""
    checks = list(_checks(rows))
    if checks:
        yield "## mlo against its targets\n"
        yield "| what | asked | found | |\n| --- | --- | --- | --- |"
        yield "\n".join(
            f"| {what} | {asked} | {found} | {'met' if met else 'missed'} |" for what, asked, found, met in checks
        )
        yield ""


def _checks(rows: Rows) -> Iterator[tuple[str, str, str, bool]]:
    asked = ("darts", "one_step", "neumann", "cg", "unrolled")
    ours = {c: r for c, r in rows.items() if c.library == "mlo" and "failed" not in r and c.estimator in asked}
    for case, row in ours.items():
        name, target = f"{case.workload}, `{case.estimator}`", TIME_TARGETS[case.workload]
        yield f"{name}: time over the hand-written loop", f"{target:.2f}", f"{row['ratio']:.2f}", row["ratio"] <= target
        others = {c.library: r["ratio"] for c, r in rows.items()
                  if (c.workload, c.estimator) == (case.workload, case.estimator) and "failed" not in r
                  and c.library not in ("mlo", "compiled", "hand")}  # fmt: skip
        if others:
            best = min(others, key=others.__getitem__)
            asked = f"below {others[best]:.2f} ({TITLES[best]})"
            also = rows.get(Case(case.workload, "compiled", case.estimator), {}).get("ratio", row["ratio"])
            found = f"{row['ratio']:.2f}" + (f"; compiled {also:.2f}" if also != row["ratio"] else "")
            yield f"{name}: the fastest peer", asked, found, min(row["ratio"], also) < others[best]
        if case.workload == "clean8192":
            over = row["peak_mb"] - row["baseline_mb"]
            yield f"{name}: MB over the baseline", f"{MEMORY_TARGET:.0f}", f"{over:.0f}", over <= MEMORY_TARGET
    yield from _compiled_checks(rows)
    mine, theirs = (rows.get(Case("lbt", lib, "darts"), {}) for lib in ("mlo", "betty"))
    if "ratio" in mine and "ratio" in theirs:
        times = [theirs["ratio"] / row["ratio"] for row in (mine, rows.get(Case("lbt", "compiled", "darts"), mine))]
        found = f"{times[0]:.2f}; compiled {times[1]:.2f}"
        yield "lbt, `darts`: Betty's time over mlo's", f"{LBT_TARGET}", found, max(times) >= LBT_TARGET


def _compiled_checks(rows: Rows) -> Iterator[tuple[str, str, str, bool]]:
    for workload, target in COMPILED_TARGETS.items():
        either = [rows.get(Case(workload, "compiled", estimator), {}) for estimator in ("unrolled", "recomputed")]
        found = [row["ratio"] for row in either if "ratio" in row]
        if found:
            what = f"{workload}, an unroll compiled: time over the hand-written unroll"
            yield what, f"{target:.2f}", f"{min(found):.2f}", min(found) <= target
    compiled, eager = (rows.get(Case("clean512", lib, "product"), {}) for lib in ("compiled", "mlo"))
    if "ratio" in compiled and "ratio" in eager:
        ratio = compiled["ratio"] / eager["ratio"]
        yield (
            "clean512, an exact product compiled: time over the eager one",
            f"{PRODUCT_TARGET}",
            f"{ratio:.2f}",
            (ratio <= PRODUCT_TARGET),
        )
