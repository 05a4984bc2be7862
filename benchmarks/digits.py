"""LBT, DARTS and a random architecture on digits, over seeds: the table in docs/digits.md.

    python benchmarks/digits.py --seeds 5 --output runs/digits

Each seed is one run of `mlo run lbt` with the main job's options, in a folder of its own; a seed that is finished is
read, one that was stopped goes on. Prints the table as Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from problems.report import TITLES

METHODS = ("lbt", "darts", "random")


def finished(folder: Path, seed: int) -> dict[str, Any]:
    """{method: its result} of the run with this seed, which is run or resumed if need be."""
    begin = ["run", "lbt", "--seed", str(seed), "--methods", f"[{', '.join(METHODS)}]", "--output", str(folder)]
    words = ["resume", str(folder)] if (folder / "run.json").exists() else begin
    if not (folder / "report.html").exists():
        subprocess.run([sys.executable, "-m", "mlo", *words], check=True)
    stored = {method: folder / "stages" / f"train-{method}" / "result.json" for method in METHODS}
    return {method: json.loads(path.read_text(encoding="utf-8")) for method, path in stored.items()}


def table(results: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, and each seed's error."""
    lines = ["| architecture | test error, % | weights | each seed |", "| --- | --- | --- | --- |"]
    for method in METHODS:
        errors = [result[method]["test_error"] for result in results]
        weights = statistics.mean(result[method]["parameters"] for result in results)
        spread = f"{statistics.mean(errors):.2f} ± {statistics.stdev(errors):.2f}"
        each = ", ".join(f"{error:.2f}" for error in errors)
        lines.append(f"| {TITLES[method]} | {spread} | {weights:,.0f} | {each} |")
    return "\n".join(lines)


def main() -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--output", type=Path, default=Path("runs/digits"), help="the folder of the run folders")
    options = parser.parse_args()
    print(table([finished(options.output / f"seed-{seed}", seed) for seed in range(options.seeds)]))


if __name__ == "__main__":
    main()
