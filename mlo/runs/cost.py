"""What a run will cost, from a few rounds of each of its stages."""

import statistics
import time

import torch

from mlo.ops.rng import seed_everything
from mlo.runs.job import Job
from mlo.runs.stage import stage_seed

TIMED_ROUNDS = 3


def estimate_seconds(job: Job) -> float:
    """Wall-clock seconds that the stages of ``job.stages()`` will train for, by the median of a few rounds of each.

    A first round, which allocates and warms up, is not timed. What the job does beside its stages is not in it.
    """
    threads = torch.get_num_threads()
    total = 0.0
    try:
        for name, build, rounds in job.stages():
            if job.threads is not None:
                torch.set_num_threads(job.threads)
            seed_everything(stage_seed(job.seed, name))
            engine = build()
            taken = []
            for _ in range(min(rounds, 1 + TIMED_ROUNDS)):
                began = _now()
                engine.run(1)
                taken.append(_now() - began)
            total += rounds * statistics.median(taken[1:] or taken)
    finally:
        torch.set_num_threads(threads)
    return total


def _now() -> float:
    """The time, once a card has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
