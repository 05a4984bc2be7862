"""Attacks runs of mlo, and prints what was tried and what failed.

    python -m benchmarks.torture --kills 1000 --damage 10000 --inputs 5000 --seed 1
    python -m benchmarks.torture --damage 1 --first 4711 --seed 1     # a trial again

Kills: `mlo run`, `mlo sweep` and `mlo reproduce` are killed (SIGKILL) at random times and before random file
operations, and resumed until they end. The end must be that of an unbroken run, to the last bit, and no temporary files
may be left.

Damage: bits, blocks, ends and whole files of run folders are changed, and parts of states are replaced. Each must be
refused with an error that mlo raises on purpose, or change nothing of what is loaded.

Inputs: bad options, YAML files and data. Each must end in one error, within a second and 200 MB.

It needs Linux. The exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.torture.workers import Outcome


def main() -> int:
    """The command."""
    arguments = _parser().parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    from benchmarks.torture.damage import damage_trials
    from benchmarks.torture.inputs import input_trials
    from benchmarks.torture.kills import kill_trials
    from benchmarks.torture.runs import temporary_folder
    from benchmarks.torture.workers import preload, refuse_threads, run_trials

    preload()
    refuse_threads()
    failed = 0
    for name, attack in (("kills", kill_trials), ("damage", damage_trials), ("inputs", input_trials)):
        goal, started = getattr(arguments, name), time.monotonic()
        if not goal:
            continue
        with temporary_folder() as home:
            trials = run_trials(attack(arguments.seed, home), goal, arguments.workers, arguments.first)
            failed += report(name, trials)
        print(f"  in {time.monotonic() - started:.0f} s\n", flush=True)
    print(f"{failed} failed")
    return int(failed > 0)


def report(name: str, outcomes: Iterable[Outcome]) -> int:
    """Print failures as they come, then a table; returns how many failed."""
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in outcomes:
        table[outcome.what][outcome.verdict] += 1
        if outcome.detail:
            print(f"{name}, trial {outcome.number}, {outcome.what}: {outcome.verdict}\n{outcome.detail}\n", flush=True)
    total = sum(table.values(), Counter[str]())
    for what, verdicts in [*sorted(table.items()), ("all", total)]:
        counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
        print(f"{name:8}{what:44}{verdicts.total():7}   {counts}")
    return total["failed"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.torture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="how many kills")
    parser.add_argument("--damage", type=int, default=0, metavar="N", help="how many damaged files and states")
    parser.add_argument("--inputs", type=int, default=0, metavar="N", help="how many inputs")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices but the exact moment of a kill")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="the number of the first trial")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that do the trials")
    return parser


if __name__ == "__main__":
    sys.exit(main())
