"""Writes the rows as a page of Markdown. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from benchmarks.peers.catalogue import BY_HAND, ESTIMATORS, LIBRARIES, REFERENCES, TITLES, WORKLOADS, Case

Row = Mapping[str, Any]
Rows = Mapping[Case, Row]

HEADINGS = {
    "one_step": "One step, exact product",
    "darts": "One step, central difference (DARTS)",
    "sama": "One step, central difference at the solution (SAMA)",
    "cg": "Conjugate gradient, 10 iterations",
    "neumann": "Neumann series, 10 terms",
    "unrolled": "Unrolled",
    "kept": "Unrolled, with memory for the graphs of all steps",
    "product": "One exact curvature product, by itself",
    "recomputed": "Unrolled, each step recomputed in the backward pass",
}

#: headings and references of single tables, where they differ
SPECIAL_HEADINGS = {("gpt", "cg"): "Conjugate gradient, 5 iterations, damping 100"}
SPECIAL_REFERENCES = {("gpt", "cg"): "five iterations in float64, by a Krylov basis and a direct solve"}

COMPARED_WITH = {
    "one_step": "float64 autograd through the step",
    "unrolled": "float64 autograd through all steps",
    "product": "forward-over-reverse differentiation in float64",
    "sama": "float64 autograd, with the exact product instead of the difference",
    "cg": "ten iterations in float64, by a Krylov basis and a direct solve",
    "neumann": "ten terms in float64, by forward-over-reverse differentiation",
}

TIME_TARGETS = {"mwn": 1.05, "clean512": 1.05, "clean8192": 1.05, "lbt": 1.05, "tiny": 1.1}
MEMORY_TARGET = 120.0
LBT_TARGET = 1.5
COMPILED_TARGETS = {"clean512": 0.95, "tiny": 0.45}
PRODUCT_TARGET = 0.7

HEAD = """# Benchmarks against other libraries

{summary}

This page compares the time, memory and error of `mlo` with those of other libraries for bilevel optimization, and
with loops written by hand in plain PyTorch and in JAX. `python -m benchmarks.peers` made it with torch {torch} and
Python {python}, on one thread of an {cpu}; mlo at {revision} (a + after a revision means uncommitted changes). GPUs
were not measured. [The benchmarks' own page](../benchmarks/README.md) describes how it measures.

## How to read the tables
In every workload, the *lower* problem trains a network, and the *upper* problem learns something that this training
uses: weights of the training samples in (a), (b), (d) and (e), an architecture in (c). The *hypergradient* is the
gradient of the upper loss through the training of the network. An *estimator* is a way to compute it ([Which
estimator?](estimators.md) describes them). Each table is about one workload and one estimator. LBT is [Learning by
Teaching](lbt.md).

| name | workload |
| --- | --- |
{workloads}

Rows:

- **by hand** is the loop that a careful researcher would write for this estimator alone.
- **by hand, JAX** is the same in JAX, with `jax.jit` over all of the round. The seconds are the time of the first
  hypergradient, which is compiled.
- **mlo, compiled** is the engine with `compile=True`. The seconds are the time that compiling took.

Columns:

- **time**: CPU time, divided by that of the loop by hand. The two run in turn in one process. The number is the
  median over the pairs, with the quartiles in brackets. "Itself" is the loop by hand, measured like a library: its
  distance from 1.00 is noise. Differences within the quartiles may be noise too. In the tables on recomputed steps,
  times with "of the unroll" are divided by the time of the loop by hand that recomputes nothing.
- **ms**: milliseconds of the library alone. Rows were measured at different times, so compare the ratios instead.
- **error**: relative error of the first hypergradient, in float32, against plain autograd in float64. **Cosine**: of
  the angle between the two.
- **peak**: peak memory of a fresh process, minus that of a process that only imports torch, makes the data and steps
  an optimizer ({baseline} MB); in brackets, the whole process. It includes importing the library. Freed memory goes
  back to the system at once. Compiled rows and JAX were not measured, since the compiler itself needs more.
- **default**: the same with malloc's default settings, which keep freed memory.
"""

TAIL = """## Explanations
- **Compiling** helps most where time goes into Python and small operations. It takes seconds to minutes in each run,
  so it pays off over thousands of rounds.
- **Without compiling**, the arithmetic is that of the loop by hand. `mlo` adds some Python code around each loss and
  each hypergradient, a check that gradients are finite, and a copy of the weights before each step that is
  differentiated. The Python code takes the same time for any network, so it matters most in (d).
- **(b) with N = 8192, unrolled.** By default, `mlo` keeps at most 64 MiB of the steps' autograd graphs
  (`graph_memory`) and recomputes the other steps in the backward pass, which takes more time and less memory. With
  memory for all graphs, it takes about the time of the loop by hand. In (e) with T = 4, it
  recomputes the steps too, since the graph of one step is larger than 64 MiB.
- **Memory.** In the other workloads of (a) to (d), `mlo` needs a few MB more than the loop by hand, about the same in
  all of them. In (e), where one copy of the weights takes 44 MB, it needs up to four copies more.
- **JAX** compiles the whole round, with all steps and products, so it spends no time in Python between them. There is
  no JAX version of (e).
- **Betty's `darts`** leaves out the learning rate, and computes its difference at the weights after the step. Its `cg`,
  as released, is not conjugate gradient. So their errors are large, and their times are those of another computation,
  which is cheaper in the case of `darts`.
- [Where the time goes](../benchmarks/README.md#where-the-time-goes) has the measurements behind these explanations.
"""

TARGETS_HEAD = """"The fastest peer" is the fastest other library; `mlo` meets the target if it takes less time,
compiled or not.

| what | target | measured | |
| --- | --- | --- | --- |"""

NAMES = {
    "mwn": "meta-weight-net",
    "clean512": "hyper-cleaning with N = 512",
    "clean8192": "hyper-cleaning with N = 8192",
    "lbt": "LBT",
    "tiny": "hyper-cleaning of a tiny network",
    "gpt": "the GPT",
    "gpt4": "the GPT with 4 steps",
}


def page(rows: Rows, machine: Mapping[str, str]) -> str:
    """The whole page."""
    torch = next((row["torch"] for row in rows.values() if "torch" in row), "?")
    baselines = [row["baseline_mb"] for row in rows.values() if "baseline_mb" in row] or [0.0]
    baseline = f"{min(baselines):.0f} to {max(baselines):.0f}"
    revisions = sorted({row["revision"] for row in rows.values() if row.get("revision")})
    head = HEAD.format(
        torch=torch,
        baseline=baseline,
        revision=", ".join(revisions) or "an unknown revision",
        summary=summary(rows),
        workloads="\n".join(f"| `{name}` | {title} |" for name, title in WORKLOADS.items()),
        **machine,
    )
    parts = [head, *_targets(rows)]
    for workload, title in WORKLOADS.items():
        tables = [t for e in ESTIMATORS[workload] if (t := _table(rows, workload, e))]
        if tables:
            parts += [f"## {title}\n", *tables]
    return "\n".join([*parts, TAIL])


class _Race(NamedTuple):
    """Ratios on one workload and estimator: mlo's, its better one, compiled or not, and the fastest other library's."""

    name: str
    eager: float
    ours: float
    theirs: float
    peer: str
    overlap: bool

    def __str__(self) -> str:
        return f"{self.name} ({self.ours:.2f}; {self.peer} {self.theirs:.2f})"


def _races(rows: Rows) -> Iterator[_Race]:
    for workload, estimators in ESTIMATORS.items():
        for estimator in estimators:
            found = {c.library: r for c, r in rows.items()
                     if (c.workload, c.estimator) == (workload, estimator) and "failed" not in r}  # fmt: skip
            ours = [found[library] for library in ("mlo", "compiled") if library in found]
            others = [library for library in found if library not in ("mlo", "compiled", *BY_HAND)]
            if ours and others:
                best, peer = min(ours, key=_ratio), min(others, key=lambda library: _ratio(found[library]))
                (low, high), (peer_low, peer_high) = best["quartiles"], found[peer]["quartiles"]
                overlap = low <= peer_high and peer_low <= high
                name, fastest = f"`{estimator}` on {NAMES[workload]}", TITLES[peer].split()[0]
                yield _Race(name, _ratio(ours[0]), _ratio(best), _ratio(found[peer]), fastest, overlap)


def _ratio(row: Row) -> float:
    return float(row["ratio"])


def summary(rows: Rows) -> str:
    """Where mlo is the fastest library and where it is not, in a sentence; empty without rows of other libraries."""
    races = sorted(_races(rows), key=lambda race: race.ours / race.theirs)
    won = [race for race in races if race.ours < race.theirs]
    if not races:
        return ""
    text = f"On one CPU thread, `mlo` (compiled where that helps) is the fastest library in {len(won)} of {len(races)} "
    text += "comparisons" + "".join([", with the largest lead for ", " and ".join(map(str, won[:2]))] if won else [])
    lost = " and ".join(map(str, races[len(won) :]))
    text += f", but another library is faster for {lost}." if lost else "."
    text += "\nThe numbers in brackets are CPU times, divided by that of a loop written by hand."
    close = sum(race.overlap for race in won)
    if close:
        text += f" In {close} of the {len(won)}, the quartiles overlap, so the lead may be noise."
    eager = [race.eager for race in races]
    text += f" Without compiling, `mlo` takes {min(eager):.2f} to {max(eager):.2f} times as long as that loop."
    return text + _beside_jax(rows)


def _beside_jax(rows: Rows) -> str:
    """How long loops in JAX take, in a sentence; empty without their rows."""
    found = {case: _ratio(row) for case, row in rows.items() if case.library == "jax" and "ratio" in row}
    if not found:
        return ""
    ours = {
        case: [_ratio(row) for library in ("mlo", "compiled")
               if "ratio" in (row := rows.get(Case(case.workload, library, case.estimator), {}))]
        for case in found
    }  # fmt: skip
    pairs = [(ratio, min(ours[case])) for case, ratio in found.items() if ours[case]]
    faster = sum(ratio < mine for ratio, mine in pairs)
    return (
        f"\nThe loop by hand, written in JAX and compiled, takes {min(found.values()):.2f} to "
        f"{max(found.values()):.2f} times as long as the one in PyTorch, and is faster than `mlo` in {faster} of "
        f"{len(pairs)} comparisons."
    )


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
    heading = SPECIAL_HEADINGS.get((workload, estimator), HEADINGS[estimator])
    against = SPECIAL_REFERENCES.get((workload, estimator), COMPARED_WITH[REFERENCES[estimator]])
    lines = [f"### {heading}\n", f"Error against {against}.\n"]
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
        yield TARGETS_HEAD
        yield "\n".join(
            f"| {what} | {asked} | {found} | {'met' if met else 'missed'} |" for what, asked, found, met in checks
        )
        yield ""


def _checks(rows: Rows) -> Iterator[tuple[str, str, str, bool]]:
    asked = ("darts", "one_step", "neumann", "cg", "unrolled")
    ours = {c: r for c, r in rows.items() if c.library == "mlo" and "failed" not in r and c.estimator in asked}
    for case, row in ours.items():
        if case.workload not in TIME_TARGETS:
            continue
        name, target = f"{case.workload}, `{case.estimator}`", TIME_TARGETS[case.workload]
        yield f"{name}: time over the hand-written loop", f"{target:.2f}", f"{row['ratio']:.2f}", row["ratio"] <= target
        others = {c.library: r["ratio"] for c, r in rows.items()
                  if (c.workload, c.estimator) == (case.workload, case.estimator) and "failed" not in r
                  and c.library not in ("mlo", "compiled", *BY_HAND)}  # fmt: skip
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
