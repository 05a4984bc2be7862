"""Seconds of a call on a GPU, peak memory, and the precision of convolutions and matrix products."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch

Call = Callable[[], object]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(
    call: Call, device: torch.device, seconds: float, least: int = 3, most: int = 200, warm: int = 2
) -> float:
    """The median wall-clock time of a call with the work that it starts on the device.

    Args:
        call: what to measure.
        device: that is waited for after each call.
        seconds: for all calls together.
        least, most: numbers of calls.
        warm: the number of calls before.
    """
    for _ in range(warm):
        call()
    synchronize(device)
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < least or (time.monotonic() < end and len(times) < most):
        begin = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def streamed_seconds(call: Call, device: torch.device, count: int) -> float:
    """The wall-clock time of a call where the host may run ahead: of ``count`` calls, the device waited for once."""
    call()
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return (time.perf_counter() - begin) / count


def kernel_seconds(call: Call, device: torch.device, calls: int = 10) -> float:
    """The time of a call's kernels alone: ``calls`` of them are one CUDA graph. On the CPU, the time of the call."""
    if device.type != "cuda":
        return median_seconds(call, device, 0.01, most=5)
    graph = captured(lambda: [call() for _ in range(calls)])
    return median_seconds(graph.replay, device, 0.08, least=5, most=20) / calls


def captured(call: Call) -> torch.cuda.CUDAGraph:
    """A call as one CUDA graph, after three calls to warm up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph


def begin_peak(device: torch.device) -> None:
    """Free what is no longer used, and measure the peak memory from now on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: torch.device) -> float | None:
    """The peak memory of tensors since :func:`begin_peak`, in GiB; None on the CPU."""
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None


def set_precision(tf32: bool, benchmark: bool = False) -> None:
    """Whether float32 convolutions and matrix products may use TF32, and whether cuDNN tries all its kernels."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = benchmark
