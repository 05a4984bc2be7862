"""Measures a search by Learning by Teaching on a GPU.

    python -m benchmarks.gpu --out runs/gpu            # all sections, in under 8 minutes
    python -m benchmarks.gpu --out runs/gpu --report   # the figures of docs/gpu.md, from these results
    python -m benchmarks.gpu --smoke                   # does everything run? on the CPU, at a tiny size
    python -m benchmarks.gpu --count                   # launches and memory, without a GPU; writes docs/gpu.md

Each section runs in its own process and within its time, and writes SECTION.json; one that fails does not stop the
others. It needs torch, torchvision and pydantic; the tests also need what `pip install '.[dev]'` installs.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from benchmarks.gpu.report import report
from benchmarks.gpu.sections import SECTIONS, SMOKE_TOTAL, TOTAL
from benchmarks.measuring import replace_table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"


def main() -> int:
    """The command; returns 1 if a section failed."""
    arguments = _parser().parse_args()
    if arguments.report:
        print(report(arguments.out))
        return 0
    if arguments.count:
        from benchmarks.gpu import counted, peak

        for mark, rows in (("counted", counted.table(counted.count_rounds())), ("memory", peak.table(peak.peaks()))):
            print(rows)
            replace_table(PAGE, mark, rows)
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1" if arguments.smoke else "4")
    from benchmarks.gpu.running import run_sections  # imports torch, which the help and the report do not need

    total = arguments.seconds or (SMOKE_TOTAL if arguments.smoke else TOTAL)
    statuses = run_sections(arguments.sections, arguments.out, total, arguments.smoke)
    rows = [f"{name:14}{status}" for name, status in statuses.items()]
    print("", *rows, f"results: {arguments.out}", sep="\n")
    return int(any(status.startswith(("failed", "stopped")) for status in statuses.values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        epilog="sections:\n" + "\n".join(f"  {name:14}{section.about}" for name, section in SECTIONS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    folder = Path(tempfile.gettempdir()) / "mlo-gpu"
    parser.add_argument("--out", type=Path, default=folder, help=f"the folder of the results (default: {folder})")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=[*SECTIONS], metavar="SECTION")
    parser.add_argument("--seconds", type=float, help=f"for all sections together (default: {TOTAL:.0f})")
    parser.add_argument("--smoke", action="store_true", help="run at a tiny size on the CPU")
    parser.add_argument("--report", action="store_true", help="measure nothing; print tables of the results in --out")
    parser.add_argument(
        "--count",
        action="store_true",
        help="measure nothing; count kernel launches and peak memory, and write the tables of docs/gpu.md",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
