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
    return [line.values for line in _lines(stage / METRICS) if line.values is not None]


def cut_metrics(stage: Path, rounds: int) -> Path:
    """Remove the lines after a number of rounds, which a killed process wrote; returns the path of the file."""
    path = stage / METRICS
    lines = _lines(path)
    kept = [number for number, line in enumerate(lines, 1) if line.values and line.values["step"] <= rounds]
    if path.exists():
        write_atomic(path, b"".join(line.text for line in lines[: max(kept, default=0)]))
    return path


def _lines(path: Path) -> list[Line]:
    if not path.exists():
        return []
    *whole, _ = path.read_bytes().split(b"\n")  # what follows the last line break is empty, or half a line
    lines = [Line(text + b"\n", _values(text)) for text in whole]
    damaged = [str(number) for number, line in enumerate(lines, 1) if line.values is None]
    if damaged:
        print(f"warning: {path}: damaged, and left out: line {', '.join(damaged[:8])}", file=sys.stderr)
    return lines


def _values(text: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and type(values.get("step")) is int else None
