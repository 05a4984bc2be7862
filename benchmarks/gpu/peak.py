"""The table of docs/gpu.md of memory: the peak of a round by estimator, on tensors without data."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.gpu.counting import Counting
from benchmarks.gpu.pretended import GPU, pretended_gpu
from benchmarks.gpu.workload import PAPER, Size, search_engine
from mlo.training.diagnostics import _PeakMemory

ESTIMATORS = {
    "`first_order`": "first_order",
    "`darts`": "darts",
    "`one_step`, product `exact`": "one_step",
    "`one_step`, product `forward`": {"kind": "one_step", "product": "forward"},
}


def peaks(size: Size = PAPER) -> dict[str, tuple[int, int]]:
    """{estimator: the peak in bytes of a round of DARTS-2nd alone, and of one of Learning by Teaching}.

    This counts the tensors that the round makes, each once. It leaves out networks, optimizer states, what cuDNN needs
    for itself, and what the allocator keeps.
    """
    size = size._replace(stored=min(size.stored, 1_000))
    return {
        name: (_peak(size, estimator, False), _peak(size, estimator, True)) for name, estimator in ESTIMATORS.items()
    }


def _peak(size: Size, estimator: object, student: bool) -> int:
    with pretended_gpu():
        engine = search_engine(size, GPU, student=student, hypergradient=estimator)
        with Counting():
            engine.step()
        with _PeakMemory() as memory, Counting():
            engine.step()
    return memory.peak


def table(found: Mapping[str, tuple[int, int]]) -> str:
    """The peaks in Markdown."""
    rows = ["| estimator | DARTS alone, GB | Learning by Teaching, GB |", "| --- | --- | --- |"]
    rows += [f"| {name} | {alone / 1e9:.1f} | {taught / 1e9:.1f} |" for name, (alone, taught) in found.items()]
    return "\n".join(rows)
