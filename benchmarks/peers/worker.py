"""One measurement in its own process; writes a JSON file. ``python -m benchmarks.peers`` runs it."""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.catalogue import REFERENCES, Case
from benchmarks.peers.libraries import Runner, build
from benchmarks.peers.reference import flat, reference
from benchmarks.peers.workloads import make

BLOCK = 0.05  # minimum CPU seconds of one loop before the other has its turn
LIMIT = 12.0  # CPU seconds after which no new pair of blocks starts, if there are three; nor rounds, if there are two


def measure_time(case: Case, size: str, stored: Path) -> dict[str, Any]:
    """The error of the first hypergradient in float32, and the time relative to the hand-written loop."""
    runner = build(case.library, make(case.workload, size), case.estimator)
    start = time.perf_counter()
    found = flat(runner.gradient())
    first, exact = time.perf_counter() - start, torch.load(stored)
    result: dict[str, Any] = {
        "error": float((found - exact).norm() / exact.norm()),
        "cosine": float(found @ exact / (found.norm() * exact.norm())),
    }
    beside_unroll = case.library in ("hand", "jax", "compiled") and case.estimator == "recomputed"
    hand = build("hand", make(case.workload, size), "unrolled" if beside_unroll else case.estimator)
    hand.gradient()
    if case.library == "jax":
        result["compile_seconds"] = first
    if case.library == "compiled":
        start = time.perf_counter()
        for _ in range(3):
            runner.round()
        result["compile_seconds"] = time.perf_counter() - start
    return result | _timed(runner, hand, 11 if size == "full" else 3)


def _timed(runner: Runner, hand: Runner, pairs: int) -> dict[str, Any]:
    """Run both in turn, in blocks; return the median of the ratios of the pairs."""
    runner.round()
    hand_round = _seconds(hand.round, 1)
    if hand_round < BLOCK:
        hand_round = _seconds(hand.round, 3)
    count = max(1, round(BLOCK / hand_round))
    ratios, ours, theirs = [], [], []
    start = time.process_time()
    for pair in range(pairs):
        if pair >= 3 and time.process_time() - start > LIMIT:
            break
        if pair % 2:
            mine, other = _seconds(runner.round, count), _seconds(hand.round, count)
        else:
            other, mine = _seconds(hand.round, count), _seconds(runner.round, count)
        ratios.append(mine / other)
        ours.append(mine)
        theirs.append(other)
    quarters = statistics.quantiles(ratios, n=4)
    return {
        "ratio": statistics.median(ratios),
        "quartiles": [quarters[0], quarters[2]],
        "milliseconds": 1000 * statistics.median(ours),
        "hand_milliseconds": 1000 * statistics.median(theirs),
        "pairs": len(ratios),
        "rounds": count,
    }


def _seconds(call: Callable[[], object], count: int) -> float:
    gc.collect()
    start = time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - start) / count


def measure_memory(case: Case, size: str) -> dict[str, Any]:
    """The peak memory of the process after some rounds, in MB. For case.library "none", only the data is made.

    An optimizer takes a step first in every case, since torch loads its compiler with the first optimizer, which needs
    over 100 MB.
    """
    task = make(case.workload, size)
    scalar = torch.zeros((), requires_grad=True)
    scalar.square().backward()
    torch.optim.SGD([scalar], lr=0.1).step()
    if case.library != "none":
        runner = build(case.library, task, case.estimator)
        ready = _peak()
        runner.gradient()
        start = time.process_time()
        for count in range(20 if task.trains else 2):
            if count < 2 or time.process_time() - start < LIMIT:
                runner.round()
        return {"peak_mb": _peak(), "imported_mb": ready}
    return {"peak_mb": _peak()}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Do the measurement that the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("workload", "library", "estimator", "mode", "size"):
        parser.add_argument(name)
    parser.add_argument("result", type=Path)
    parser.add_argument("stored", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    case = Case(options.workload, options.library, options.estimator)
    try:
        if options.mode == "reference":
            torch.save(reference(case.workload, REFERENCES[case.estimator], options.size), options.stored)
            found: dict[str, Any] = {}
        elif options.mode == "memory":
            found = measure_memory(case, options.size)
        else:
            found = measure_time(case, options.size, options.stored)
    except Exception as error:  # noqa: BLE001  a crash of a library is a result
        lines = str(error).strip().splitlines() or [""]
        found = {"failed": f"{type(error).__name__}: {lines[0]}"}
    found["torch"] = torch.__version__
    options.result.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
