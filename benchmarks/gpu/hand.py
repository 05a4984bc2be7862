"""Section `hand`: the round by hand, eager and as one CUDA graph: the mark for the engine to reach."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.hand_round import HandRound, Precision
from benchmarks.gpu.profiles import profile
from benchmarks.gpu.sections import gpu_days
from benchmarks.gpu.session import Session
from benchmarks.gpu.timing import (
    begin_peak,
    captured,
    median_seconds,
    peak_gib,
    set_precision,
    streamed_seconds,
)
from benchmarks.gpu.workload import new_task
from benchmarks.lbt_step import Task

NEEDED = 8.0  # seconds, to begin another variant with


class Variant(NamedTuple):
    """Whether TF32 is on, what runs under autocast, and whether the student is channels-last."""

    tf32: bool = False
    precision: Precision = Precision()
    student_last: bool = False
    profiled: bool = False


VARIANTS = {
    "float32": Variant(),
    "TF32": Variant(tf32=True, profiled=True),
    "TF32, student channels-last": Variant(tf32=True, student_last=True),
    "bfloat16, products in float32": Variant(True, Precision(torch.bfloat16), student_last=True),
    "bfloat16": Variant(True, Precision(torch.bfloat16, products=True), student_last=True, profiled=True),
}


def measure(session: Session) -> None:
    """Seconds of a round eager and as one CUDA graph, peak memory, GPU-days of a search, and profiles of the graph."""
    for name, variant in VARIANTS.items():
        if session.smoke and variant.tf32 and variant.precision.low is None:
            session.skip(name)  # on a CPU it is float32
        elif session.has_time(name, 0.0 if session.smoke else NEEDED):
            with session.attempt(name):
                _measure(session, name, variant)


def _measure(session: Session, name: str, variant: Variant) -> None:
    device = session.device
    set_precision(variant.tf32, benchmark=device.type == "cuda")
    begin_peak(device)
    loop = HandRound(_ordered(new_task(session.size, device), variant.student_last), precision=variant.precision)
    step: Any = loop.step
    eager = median_seconds(step, device, 0.0, least=1, warm=0) if session.smoke else streamed_seconds(step, device, 3)
    found: dict[str, Any] = {"eager_s": round(eager, 4), "eager_peak_gib": peak_gib(device)}
    if device.type == "cuda":
        begin = time.perf_counter()
        graph = captured(loop.step)
        found["capture_s"] = round(time.perf_counter() - begin, 2)
        seconds = median_seconds(graph.replay, device, min(4.0, session.left() / 5), least=5, most=30)
        found |= {"graph_s": round(seconds, 4), "gpu_days": gpu_days(seconds), "peak_gib": peak_gib(device)}
        step = graph.replay
    found["losses"] = [round(loss, 4) for loss in loop.losses.tolist()]
    session.note(name, found)
    if device.type != "cuda":
        session.skip(f"{name}, one CUDA graph")
    if variant.profiled and not session.smoke:
        with session.attempt(f"profile of {name}"):
            session.note(f"profile of {name}", profile(step, device))


def _ordered(task: Task, student_last: bool) -> Task:
    """The task with images and the student in channels-last order, if asked for."""
    if not student_last:
        return task

    def last(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last)

    task.student.to(memory_format=torch.channels_last)
    (images, labels), (judged, classes) = task.training, task.validation
    return task._replace(
        training=(last(images), labels), validation=(last(judged), classes), unlabeled=last(task.unlabeled)
    )
