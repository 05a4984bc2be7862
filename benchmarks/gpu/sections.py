"""The sections, and the cost of a search that they are about. Does not import torch."""

from __future__ import annotations

from typing import NamedTuple

ROUNDS = 50 * (25_000 // 64)
"""Of a search: 50 epochs over 25,000 training images in batches of 64."""
PAPER_GPU_DAYS = {"LBT": 1.9, "DARTS-2nd": 1.5}
"""The cost of a search in the LBT paper, table 3: LBT(RN18, DARTS-2nd) and DARTS-2nd."""


class Section(NamedTuple):
    """A section: the module whose function `measure` it is, its longest time, and what it measures."""

    module: str
    seconds: float
    about: str


SECTIONS = {
    "device": Section("device", 25, "name, memory, driver; matrix products, bandwidth, cost of a launch"),
    "engine": Section(
        "engine", 150, "rounds by the engine, as usual and captured, with dropout, and DARTS-2nd alone; profiles"
    ),
    "hand": Section("hand", 75, "the same round by hand, eager and as one CUDA graph: the mark to reach"),
    "waits": Section("waits", 20, "the lines where a round waits for the device"),
    "tests": Section("cuda_tests", 110, "the tests that are marked cuda"),
    "convolutions": Section("convolutions", 45, "the supernet's convolutions beside their bytes, in both orders"),
    "compile": Section("compiled", 150, "compile=True on three cells, alone and captured"),
}
COMPILED = {
    "eager": {},
    "compiled": {"compile": True},
    "captured": {"capture": True},
    "compiled and captured": {"compile": True, "capture": True},
}
"""The engines of section `compile`, and their options."""
TOTAL, SMOKE_TOTAL = 465.0, 60.0
"""Seconds for all sections together."""


def gpu_days(seconds: float) -> float:
    """Of a search whose rounds take this long."""
    return round(seconds * ROUNDS / 86_400, 4)
