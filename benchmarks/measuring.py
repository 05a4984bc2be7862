"""CPU times of candidates, and writing a benchmark's table into a page of the documentation."""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

SEARCH_SPACES = Path(__file__).resolve().parents[1] / "docs" / "search_spaces.md"


def cpu_seconds(candidates: list[Callable[[], object]], rounds: int) -> list[float]:
    """Return the median CPU time of each candidate. They take turns, after one warm-up round."""
    times: list[list[float]] = [[] for _ in candidates]
    for _ in range(rounds + 1):
        for own, candidate in zip(times, candidates, strict=True):
            begin = time.process_time()
            candidate()
            own.append(time.process_time() - begin)
    return [statistics.median(own[1:]) for own in times]


def write_table(description: str | None, table: Callable[[int], str], page: Path, mark: str) -> None:
    """The command of a benchmark: measure, print the table, and replace the one in the page.

    Args:
        description: shown by --help.
        table: maps a number of rounds to the table in Markdown.
        page: the file with the table, between the lines `<!-- mark -->` and `<!-- end -->`.
        mark: the mark of the table.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds to take the median of")
    rows = table(parser.parse_args().rounds)
    print(rows)
    replace_table(page, mark, rows)


def replace_table(page: Path, mark: str, rows: str) -> None:
    """Replace the table of a page that is between the lines `<!-- mark -->` and `<!-- end -->`."""
    text = page.read_text(encoding="utf-8")
    marked = re.sub(rf"(<!-- {mark} -->\n).*?(\n<!-- end -->)", lambda m: m[1] + rows + m[2], text, flags=re.DOTALL)
    page.write_text(marked, encoding="utf-8")
