"""Section `engine`: rounds of a search in several precisions, as usual and captured; and second-order DARTS alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.profiles import profile
from benchmarks.gpu.sections import gpu_days
from benchmarks.gpu.session import Session
from benchmarks.gpu.timing import (
    begin_peak,
    median_seconds,
    peak_gib,
    set_precision,
    streamed_seconds,
    synchronize,
)
from benchmarks.gpu.workload import search_engine

NEEDED = 8.0  # seconds, to begin another variant with
BFLOAT16 = {"autocast": torch.bfloat16}
LOW_PRODUCTS = {"hypergradient": {"kind": "one_step", "product": {"kind": "central", "autocast": True}}}


class Variant(NamedTuple):
    """How rounds are taken: whether TF32 and cuDNN's search for kernels are on, and options of the engine."""

    tf32: bool = False
    benchmark: bool = False
    options: Mapping[str, Any] = MappingProxyType({})
    profiled: bool = False

    @property
    def captured(self) -> bool:
        """Whether rounds are replayed as a CUDA graph."""
        return bool(self.options.get("capture"))


BEFORE_REPLAYS = 4  # rounds
CAPTURE, DROPOUT = {"capture": True}, {"dropout": 0.2}
VARIANTS = {
    "float32": Variant(),
    "TF32": Variant(tf32=True),
    "TF32, cuDNN's fastest": Variant(tf32=True, benchmark=True, profiled=True),
    "bfloat16, products in float32": Variant(tf32=True, benchmark=True, options=BFLOAT16),
    "bfloat16": Variant(tf32=True, benchmark=True, options={**BFLOAT16, **LOW_PRODUCTS}, profiled=True),
    "float32, captured": Variant(benchmark=True, options=CAPTURE),
    "TF32, captured": Variant(tf32=True, benchmark=True, options=CAPTURE),
    "bfloat16, captured": Variant(tf32=True, benchmark=True, options={**BFLOAT16, **LOW_PRODUCTS, **CAPTURE}),
    "TF32, student with dropout": Variant(tf32=True, benchmark=True, options=DROPOUT),
    "TF32, student with dropout, captured": Variant(tf32=True, benchmark=True, options={**DROPOUT, **CAPTURE}),
    "DARTS-2nd alone, TF32, cuDNN's fastest": Variant(tf32=True, benchmark=True, options={"student": False}),
    "DARTS-2nd alone, TF32, captured": Variant(tf32=True, benchmark=True, options={"student": False, **CAPTURE}),
}
"""Of what is multiplied; float32 products are in TF32 where torch may choose it."""


def measure(session: Session) -> None:
    """Seconds of a round, peak memory, GPU-days of a search, and a profile of one round."""
    for name, variant in VARIANTS.items():
        same = variant.tf32 and not variant.options
        if session.smoke and (same or variant.captured or "dropout" in variant.options):
            session.skip(name)  # on a CPU nothing is captured, and TF32 is float32
        elif session.has_time(name, 0.0 if session.smoke else NEEDED):
            with session.attempt(name):
                _measure(session, name, variant)


def _measure(session: Session, name: str, variant: Variant) -> None:
    device = session.device
    set_precision(variant.tf32, variant.benchmark and device.type == "cuda")
    begin_peak(device)
    engine = search_engine(session.size, device, **variant.options)
    begin = time.perf_counter()
    engine.step()
    synchronize(device)
    first = time.perf_counter() - begin
    if session.smoke:
        alone = ahead = median_seconds(engine.step, device, 0.0, least=1, warm=0)
    else:
        warm = BEFORE_REPLAYS if variant.captured else 2
        alone = median_seconds(engine.step, device, min(6.0, session.left() / 4), least=4, most=20, warm=warm)
        ahead = streamed_seconds(engine.step, device, max(2, min(10, int(session.left() / 6 / alone))))
    found: dict[str, Any] = {
        "first_s": round(first, 2),
        "round_s": round(alone, 4),
        "streamed_s": round(ahead, 4),
        "gpu_days": None if session.smoke else gpu_days(ahead),
        "peak_gib": peak_gib(device),
        "losses": {key: round(value, 4) for key, value in engine.metrics().items() if key.endswith("/loss")},
    }
    if variant.captured:
        report = engine.report()
        found |= {"replayed": report.replayed, "not_captured": report.not_captured}
    session.note(name, found)
    if variant.profiled:
        call = partial(engine.objective, "teacher") if session.smoke else engine.step  # a round takes 10 s on a CPU
        with session.attempt(f"profile of {name}"):
            session.note(f"profile of {name}", profile(call, device))
