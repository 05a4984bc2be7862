"""What runs will cost, estimated from a few measured rounds of each kind of run.

`python -m mlo.sweeps.cost RUN_DIR` is the process that measures the run of a folder.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from mlo.errors import MloError
from mlo.ops.rng import derived_seed, seed_everything
from mlo.runs.folder import LOG, create_folder, stored_job
from mlo.runs.job import Job
from mlo.sweeps.grid import Planned
from mlo.sweeps.processes import Command, Failure, run_processes

TIMED_ROUNDS = 3


class Cost(NamedTuple):
    """The estimated cost of runs.

    Attributes:
        seconds: wall-clock time of all runs.
        core_seconds: CPU time of all cores.
        cuda: whether they run on a GPU, which the processes share.
        processes: how many run at the same time.
    """

    seconds: float
    core_seconds: float
    cuda: bool
    processes: int = 1

    def __str__(self) -> str:
        processes = f"{self.processes} process{'es' * (self.processes > 1)}"
        number, unit = (self.seconds / 86400, "GPU-days") if self.cuda else (self.core_seconds / 3600, "CPU-hours")
        total = f"{number:.0f} {unit}" if number >= 10 else f"{max(number, 0.01):.2g} {unit}"
        return f"about {duration(self.seconds)} on {processes} ({total})"


def cost(left: Mapping[str, Sequence[Planned]], workers: int, one_core_each: bool) -> Cost:
    """Estimate the cost of the runs {key: those that are left}, from a few rounds of one run of each key.

    Raises:
        MloError: if one of these runs fails.
        KeyboardInterrupt: if a SIGINT or SIGTERM came.
    """
    firsts = {key: runs[0] for key, runs in left.items() if runs}
    costs = _measure_all(firsts, workers, one_core_each)
    seconds = sum(len(left[key]) * one.seconds for key, one in costs.items())
    core_seconds = sum(len(left[key]) * one.core_seconds for key, one in costs.items())
    longest = max(one.seconds for one in costs.values())
    processes = min(workers, sum(map(len, left.values())))
    return Cost(
        max(seconds / processes, longest),
        seconds if one_core_each else core_seconds,
        any(one.cuda for one in costs.values()),
        processes,
    )


def _measure_all(runs: Mapping[str, Planned], workers: int, one_core_each: bool) -> dict[str, Cost]:
    """Measure runs with as many at the same time as there will be later, since they slow each other down."""
    measured: dict[str, Cost] = {}
    with TemporaryDirectory() as temporary:

        def command(key: str) -> Command:
            folder = create_folder(runs[key].job, runs[key].load(), Path(temporary, key))
            return ["mlo.sweeps.cost", str(folder)], folder / LOG

        def ended(key: str, failure: Failure | None) -> None:
            if failure:
                raise MloError(f"measuring the cost of {key} failed: {failure.message}")
            *_, last = Path(temporary, key, LOG).read_text(encoding="utf-8").splitlines()
            measured[key] = Cost(*json.loads(last))

        run_processes([*runs], command, ended, workers, one_core_each)
    return measured


def measure(job: Job) -> Cost:
    """Estimate what a run costs from the median of a few rounds of each of its stages.

    The first round, which allocates memory and warms up, is not counted. What the job does outside its stages is not
    included.
    """
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    total = 0.0
    for name, build, rounds in job.stages():
        seed_everything(derived_seed(job.seed, name))
        engine = build()
        seconds = []
        for _ in range(min(rounds, 1 + TIMED_ROUNDS)):
            start = _now()
            engine.run(1)
            seconds.append(_now() - start)
        total += rounds * statistics.median(seconds[1:] or seconds)
    cuda = torch.cuda.is_available() if job.device == "auto" else job.device.startswith("cuda")
    return Cost(total, total * torch.get_num_threads(), cuda)


def _now() -> float:
    """The time, after a GPU has finished its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def duration(seconds: float) -> str:
    """A time in words: `40 s`, `2 h 40 min`, `3 days 2 h`."""
    if seconds < 60:
        return f"{max(1, math.ceil(seconds))} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    words = [f"{days} day{'s' * (days > 1)}" * (days > 0), f"{hours} h" * (hours > 0), f"{minutes} min" * (minutes > 0)]
    return " ".join([word for word in words if word][:2])


def main(folder: Path) -> None:
    """Measure the run of a folder, and print what was measured as a line of JSON."""
    try:
        print(json.dumps(measure(stored_job(folder)[1])))
    except MloError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
