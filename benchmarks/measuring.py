"""CPU time of candidates taken in turns, and the table of a benchmark in the page that shows it."""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

SEARCH_SPACES = Path(__file__).resolve().parents[1] / "docs" / "search_spaces.md"


def cpu_seconds(candidates: list[Callable[[], object]], rounds: int) -> list[float]:
    """The median CPU time of each, taken in turns after one round to warm up."""
    times: list[list[float]] = [[] for _ in candidates]
    for _ in range(rounds + 1):
        for own, candidate in zip(times, candidates, strict=True):
            begin = time.process_time()
            candidate()
            own.append(time.process_time() - begin)
    return [statistics.median(own[1:]) for own in times]


def write_table(description: str | None, table: Callable[[int], str], page: Path, mark: str) -> None:
    """A benchmark's command: measure, print the table and put it into the page, between `<!-- mark -->` and an end."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is taken")
    rows = table(parser.parse_args().rounds)
    print(rows)
    text = page.read_text(encoding="utf-8")
    marked = re.sub(rf"(<!-- {mark} -->\n).*?(\n<!-- end -->)", lambda m: m[1] + rows + m[2], text, flags=re.DOTALL)
    page.write_text(marked, encoding="utf-8")
