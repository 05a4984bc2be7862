"""The table of docs/gpu.md that needs no GPU: what a round would launch, compute and move at the paper's size."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.gpu.causes import CAUSES
from benchmarks.gpu.counting import Counting, count_step
from benchmarks.gpu.hand_round import HandRound
from benchmarks.gpu.pretended import GPU, pretended_gpu
from benchmarks.gpu.workload import PAPER, Size, new_task, search_engine

STORED = 1_000  # images in each part: their number changes nothing in a round


def count_rounds(size: Size = PAPER) -> dict[str, Counting]:
    """Counts of a round by the engine, of the same round by hand, and of DARTS-2nd alone by the engine.

    Only those of the engine include making the batches.

    Raises:
        HostReadError: if one of them reads a value of the GPU on the host.
    """
    size = size._replace(stored=min(size.stored, STORED))
    with pretended_gpu():
        return {
            "engine": count_step(search_engine(size, GPU).step),
            "by hand": count_step(HandRound(new_task(size, GPU)).step),
            "engine, DARTS-2nd alone": count_step(search_engine(size, GPU, student=False).step),
        }


def table(counts: Mapping[str, Counting]) -> str:
    """The counts in Markdown."""
    found = counts.values()
    rows = [f"| | {' | '.join(counts)} |", f"|{' --- |' * (len(counts) + 1)}"]
    rows.append(_row("kernel launches", [f"**{count.launches:,}**" for count in found]))
    rows += [_row(cause, [f"{count.by_cause[cause]:,}" for count in found]) for cause in CAUSES]
    rows.append(_row("convolutions and matrix products, TFLOP", [f"{count.flop / 1e12:.2f}" for count in found]))
    rows.append(_row("memory read and written, GB", [f"{count.bytes / 1e9:.0f}" for count in found]))
    return "\n".join(rows)


def _row(label: str, cells: list[str]) -> str:
    return f"| {label} | {' | '.join(cells)} |"
