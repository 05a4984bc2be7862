"""The page: what every case shows, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

from . import autograd, batches, layers, losses, modules, operators, optimizers
from .case import Case
from .finding import COLUMNS, Found, verdict

PAGE = Path(__file__).parents[2] / "docs" / "what_works.md"
PARTS = (layers, losses, operators, autograd, optimizers, batches, modules)
CASES: list[Case] = [case for part in PARTS for case in part.CASES]
FAMILIES = {family: list(members) for family, members in groupby(CASES, lambda case: case.family)}
HEAD = """# What works

This page shows which layers, losses, operators, optimizers, hooks, batches and precisions a lower problem can have. A
test finds it out: it builds two levels with each of them, and compares the hypergradient, and the weights after a
round, with plain PyTorch in float64. The derivative of plain training is a central difference between two trainings
of the module with its optimizer.

| verdict | meaning |
|---|---|
| exact | It is the derivative of the training, up to the error of the difference (1e-6). |
| up to rounding | It is, up to the rounding of a lower precision. |
| approximate | It differs by less than 2 %. A note says what is left out, unless it is a finite difference. |
| not exact | It is another number. The note says why. |
| refused | mlo raises an error before anything is changed. The note is the beginning of its message. |

`one_step` differentiates one lower step, and `unrolled` two, both with the product `exact`. `cg`, `neumann`, `nystrom`
and `truncated` use the same products. `product forward` is `unrolled` with `product="forward"`. `darts` needs no second
derivatives, and its error is [that of a finite difference](estimators.md#how-products-are-computed). Its column shows
whether it helps where `one_step` does not work, and is empty elsewhere.

Batches are in float32, and mlo converts them for `engine.hypergradient(..., dtype=torch.float64)`.

As in autograd, buffers, and what a loss detaches, count as constants. With a scheduler, the table is about the
hypergradient of a round: `engine.hypergradient` uses the current learning rate for all its steps. The guide says what
can be [compiled](guide.md#compiling) and [captured](guide.md#cuda-graphs).

The tables are for PyTorch 2.14 on a CPU. `python -m tests.what_works` writes this page, and a test compares it with
what it finds.
"""


def section(family: str, found: Mapping[str, Found]) -> str:
    """The table of a family: members of which the same is found share a row."""
    rows = dict[tuple[str, ...], list[str]]()
    for case in FAMILIES[family]:
        shown = found[case.name]
        row = (*(shown.verdicts[column] for column in COLUMNS), _note(case, shown))
        rows.setdefault(row, []).append(case.name)
    titles = ["", *COLUMNS, "note"]
    lines = [titles, ["---"] * len(titles), *([", ".join(names), *row] for row, names in rows.items())]
    return f"## {family}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def find(family: str) -> dict[str, Found]:
    return {case.name: verdict(case) for case in FAMILIES[family]}


def page(found: Mapping[str, Mapping[str, Found]]) -> str:
    return "\n".join([HEAD, *(section(family, of) for family, of in found.items())])


def sections(text: str) -> dict[str, str]:
    """{family: its part of the page}."""
    parts = text.split("\n## ")[1:]
    return {part.partition("\n")[0]: f"## {part.rstrip()}\n" for part in parts}


def _note(case: Case, found: Found) -> str:
    notes = [case.note] if case.note else []
    for note, columns in found.notes.items():
        notes.append(note if len(columns) == len(COLUMNS) else f"{', '.join(columns)}: {note}")
    return "; ".join(notes).replace("|", "\\|")
