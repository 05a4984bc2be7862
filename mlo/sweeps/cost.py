"""What runs will cost, estimated from a few measured rounds of each kind of run.

`python -m mlo.sweeps.cost FILE.json` is the process that measures.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from mlo.errors import MloError
from mlo.ops.rng import seed_everything
from mlo.options.config import validate
from mlo.runs.job import Job, load_job
from mlo.runs.stage import stage_seed
from mlo.sweeps.grid import Planned
from mlo.sweeps.processes import Command, run_processes

TIMED_ROUNDS = 3


@dataclass(frozen=True)
class Cost:
    """The estimated cost of runs.

    Attributes:
        seconds: wall-clock time of all runs.
        processes: how many run at the same time.
        core_seconds: CPU time of all cores.
        cuda: whether they run on a GPU, which the processes share.
    """

    seconds: float
    processes: int
    core_seconds: float
    cuda: bool

    def __str__(self) -> str:
        processes = f"{self.processes} process{'es' * (self.processes > 1)}"
        number, unit = (self.seconds / 86400, "GPU-days") if self.cuda else (self.core_seconds / 3600, "CPU-hours")
        total = f"{number:.0f} {unit}" if number >= 10 else f"{max(number, 0.01):.2g} {unit}"
        return f"about {duration(self.seconds)} on {processes} ({total})"


@dataclass(frozen=True)
class Measured:
    """The measured cost of one run.

    Attributes:
        seconds: wall-clock time.
        threads: how many CPU threads it uses.
        cuda: whether it runs on a GPU.
    """

    seconds: float
    threads: int
    cuda: bool


def cost(left: Mapping[str, Sequence[Planned]], workers: int, one_core_each: bool) -> Cost:
    """Estimate the cost of the runs {key: those that are left}, from a few rounds of one run of each key.

    Raises:
        MloError: if one of these runs fails.
        KeyboardInterrupt: if a SIGINT or SIGTERM came.
    """
    firsts = {key: runs[0] for key, runs in left.items() if runs}
    total = core_seconds = longest = 0.0
    cuda = False
    for key, measured in _measure_all(firsts, workers, one_core_each).items():
        total += len(left[key]) * measured.seconds
        core_seconds += len(left[key]) * measured.seconds * (1 if one_core_each else measured.threads)
        longest = max(longest, measured.seconds)
        cuda = cuda or measured.cuda
    processes = max(1, min(workers, sum(map(len, left.values()))))
    return Cost(max(total / processes, longest), processes, core_seconds, cuda)


def _measure_all(runs: Mapping[str, Planned], workers: int, one_core_each: bool) -> dict[str, Measured]:
    """Measure runs in as many processes as will later do them, since runs side by side slow each other down."""
    jobs = [{"key": key, "job": run.job, "options": run.load().model_dump(mode="json")} for key, run in runs.items()]
    measured: dict[str, Measured] = {}
    with TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.json" for number in range(min(workers, len(jobs)))]
        for number, file in enumerate(files):
            file.write_text(json.dumps(jobs[number :: len(files)]), encoding="utf-8")
        with closing(run_processes(files, _command, workers, one_core_each)) as outcomes:
            for file, failure in outcomes:
                if failure:
                    raise MloError(f"measuring the cost failed: {failure.message}")
                found = json.loads(file.read_text(encoding="utf-8"))
                measured |= {key: Measured(**values) for key, values in found.items()}
    return measured


def _command(file: Path) -> Command:
    return Command(["mlo.sweeps.cost", str(file)], file.with_suffix(".log"))


def measure(job: Job) -> Measured:
    """Estimate what a run costs from the median of a few rounds of each of its stages.

    The first round, which allocates memory and warms up, is not counted. What the job does outside its stages is not
    included.
    """
    threads = torch.get_num_threads()
    total = 0.0
    try:
        for name, build, rounds in job.stages():
            if job.threads is not None:
                torch.set_num_threads(job.threads)
            seed_everything(stage_seed(job.seed, name))
            engine = build()
            seconds = []
            for _ in range(min(rounds, 1 + TIMED_ROUNDS)):
                start = _now()
                engine.run(1)
                seconds.append(_now() - start)
            total += rounds * statistics.median(seconds[1:] or seconds)
    finally:
        torch.set_num_threads(threads)
    cuda = torch.cuda.is_available() if job.device == "auto" else job.device.startswith("cuda")
    return Measured(total, job.threads or threads, cuda)


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


def main(file: Path) -> None:
    """Measure the jobs in a JSON file, and write {key: what was measured} into it."""
    measured = {}
    for entry in json.loads(file.read_text(encoding="utf-8")):
        try:
            measured[entry["key"]] = asdict(measure(validate(load_job(entry["job"]), entry["options"], entry["job"])))
        except MloError as error:
            sys.exit(f"error: {entry['key']}: {error}")
        except BaseException as error:
            error.add_note(f"while measuring {entry['key']}")
            raise
    file.write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
