"""Section `compile`: the engine's `compile=True`, alone and captured, on three cells; eight take minutes to compile."""

from __future__ import annotations

import time

from benchmarks.gpu.sections import COMPILED
from benchmarks.gpu.session import Session
from benchmarks.gpu.timing import begin_peak, median_seconds, peak_gib, set_precision, synchronize
from benchmarks.gpu.workload import search_engine

CELLS = 3
BEFORE_REPLAYS = 7  # rounds: eager and compiled ones, two of these with nothing new, and the recorded one


def measure(session: Session) -> None:
    """Seconds to compile, seconds of a round beside those of the eager engine, and what runs compiled."""
    if session.device.type != "cuda":
        session.skip("compile")
        return
    set_precision(tf32=True, benchmark=True)
    size = session.size._replace(cells=CELLS)
    session.note("cells", CELLS)
    for name, options in COMPILED.items():
        with session.attempt(name):
            begin_peak(session.device)
            engine = search_engine(size, session.device, **options)
            for round_number in ("first", "second", "third"):  # the first pass of each problem runs uncompiled
                begin = time.perf_counter()
                engine.step()
                synchronize(session.device)
                session.note(f"{name}_{round_number}_s", round(time.perf_counter() - begin, 2))
            budget = max(1.0, min(5.0, session.left() / 3))
            warm = BEFORE_REPLAYS if "capture" in options else 2
            seconds = median_seconds(engine.step, session.device, budget, warm=warm)
            session.note(f"{name}_round_s", round(seconds, 4))
            session.note(f"{name}_peak_gib", peak_gib(session.device))
            report = engine.report()
            session.note(f"{name}_replayed", report.replayed)
            session.note(f"{name}_not_captured", report.not_captured)
            session.note("report", str(report))
    import torch._dynamo  # after compiling, where it is loaded anyway

    session.note("cuda_graphs_skipped", torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])
