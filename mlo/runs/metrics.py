"""The metrics of a stage: a JSON object a line, of which a killed process may leave half of the last one."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from mlo.files import write_atomic

METRICS = "metrics.jsonl"


class Line(NamedTuple):
    """A line of metrics: its text, with the line break, and its values; None if it cannot be read."""

    text: bytes
    values: dict[str, Any] | None


def read_metrics(stage: Path) -> list[dict[str, Any]]:
    """The values of all lines that a stage has logged; damaged ones are reported and left out."""
    _report(stage)
    return [line.values for line in _lines(stage) if line.values is not None]


def cut_metrics(stage: Path, rounds: int) -> Path:
    """Remove the lines after a number of rounds, which a killed process wrote; returns the path of the file."""
    _report(stage)
    lines = _lines(stage)
    kept = [number for number, line in enumerate(lines, 1) if line.values and line.values["step"] <= rounds]
    if (stage / METRICS).exists():
        write_atomic(stage / METRICS, b"".join(line.text for line in lines[: max(kept, default=0)]))
    return stage / METRICS


def damaged_lines(stage: Path) -> list[int]:
    """The numbers of the lines that cannot be read, from 1; half a line at the end does not count."""
    return [number for number, line in enumerate(_lines(stage), 1) if line.values is None]


def _report(stage: Path) -> None:
    damaged = damaged_lines(stage)
    if damaged:
        listed = ", ".join(map(str, damaged[:8]))
        print(f"warning: {stage / METRICS}: damaged, and left out: line {listed}", file=sys.stderr)


def _lines(stage: Path) -> list[Line]:
    path = stage / METRICS
    if not path.exists():
        return []
    *whole, _ = path.read_bytes().split(b"\n")  # what follows the last line break is empty, or half a line
    return [Line(text + b"\n", _values(text)) for text in whole]


def _values(text: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and type(values.get("step")) is int else None
