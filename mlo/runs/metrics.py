"""The metrics of a stage: a JSON object a line, of which a killed process may leave half of the last one.

The file of a long stage has millions of lines, so it is never held in memory as a whole.
"""

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

METRICS = "metrics.jsonl"
MANY = 100_000  # lines of a stage, after which fewer are logged
TAIL = 2**20  # bytes at the end of a file, in which the lines after a checkpoint usually are


class Line(NamedTuple):
    """A line of metrics: its number, from 1, and its text, with the line break."""

    number: int
    text: bytes


def is_logged(step: int, log_every: int) -> bool:
    """Whether the metrics of a round are logged.

    These are all multiples of ``log_every`` at first. After 100,000 lines it is every second one, after 200,000 times
    ``log_every`` every fourth, and so on, so that the file grows with the logarithm of the number of rounds.
    """
    return step % (log_every << (step // log_every // MANY).bit_length()) == 0


def read_metrics(stage: Path, most: int | None = None) -> list[dict[str, Any]]:
    """The values of the lines that a stage has logged; damaged ones are reported and left out.

    Args:
        stage: the stage's folder.
        most: return about so many lines at most: of each of as many parts of the file a line with the most values, and
            the last line.
    """
    found, damaged = [], []
    for line in _lines(stage) if most is None else _thinned(stage, most):
        values = _values(line.text)
        if values is None:
            damaged.append(line.number)
        else:
            found.append(values)
    if damaged:
        listed = ", ".join(map(str, damaged[:8]))
        print(f"warning: {stage / METRICS}: damaged, and left out: line {listed}", file=sys.stderr)
    return found


def cut_metrics(stage: Path, rounds: int) -> Path:
    """Remove the lines after a number of rounds, which a killed process wrote; returns the path of the file."""
    path = stage / METRICS
    if path.exists():
        with path.open("r+b") as file:
            size, tail, end = file.seek(0, 2), TAIL, None
            while end is None:
                start = max(0, size - tail)
                file.seek(start)
                end = _end(file.read(), rounds, start == 0)
                tail *= 4
            file.truncate(start + end)
    return path


def damaged_lines(stage: Path) -> list[int]:
    """The numbers of the lines that cannot be read, from 1; half a line at the end does not count."""
    return [line.number for line in _lines(stage) if _values(line.text) is None]


def _end(text: bytes, rounds: int, whole: bool) -> int | None:
    """Where the last line of at most so many rounds ends; None if it is not in the text, which is not the whole."""
    end, first = text.rfind(b"\n") + 1, 0 if whole else text.find(b"\n") + 1
    while end > first:
        start = text.rfind(b"\n", 0, end - 1) + 1
        values = _values(text[start:end])
        if values is not None and values["step"] <= rounds:
            return end
        end = start
    return 0 if whole else None


def _lines(stage: Path) -> Iterator[Line]:
    """The whole lines; what follows the last line break is half a line."""
    path = stage / METRICS
    if path.exists():
        with path.open("rb") as file:
            yield from (Line(number, text) for number, text in enumerate(file, 1) if text.endswith(b"\n"))


def _thinned(stage: Path, most: int) -> Iterator[Line]:
    """A line with the most values of each of ``most`` parts, and the last line."""
    size = max(1, -(-sum(1 for _ in _lines(stage)) // most))
    lines, chosen, last = _lines(stage), None, None
    while part := list(islice(lines, size)):
        chosen, last = max(part, key=lambda line: line.text.count(b",")), part[-1]
        yield chosen
    if last is not None and last != chosen:
        yield last


def _values(text: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and type(values.get("step")) is int else None
