"""What runs in a round on the device: the number of kernels, their time, and the most expensive ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as recording

from benchmarks.gpu.timing import synchronize


def profile(call: Callable[[], object], device: torch.device, most: int = 25) -> dict[str, Any]:
    """A profile of one call; on the CPU, of operators instead of kernels.

    Returns:
        "launches", "busy_ms" (the sum of their times), "wall_ms" (with the profiler), "mean_us", and "top": the
        ``most`` expensive ones, each {"name", "count", "ms"}.
    """
    on_gpu = device.type == "cuda"
    # the 100,000 operators of a round on the host would take half a minute to sum up
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    synchronize(device)
    with recording(activities=activities, acc_events=True) as seen:
        begin = time.perf_counter()
        call()
        synchronize(device)
        wall = time.perf_counter() - begin
    events = seen.key_averages()
    if on_gpu:
        rows = [(e.key, e.count, e.self_device_time_total) for e in events if _is_kernel(e)]
    else:
        rows = [(e.key, e.count, e.self_cpu_time_total) for e in events]
    rows.sort(key=lambda row: -row[2])
    count, busy = sum(row[1] for row in rows), sum(row[2] for row in rows)
    return {
        "launches": count,
        "busy_ms": round(busy / 1e3, 1),
        "wall_ms": round(1e3 * wall, 1),
        "mean_us": round(busy / max(count, 1), 2),
        "top": [{"name": name[:110], "count": n, "ms": round(us / 1e3, 2)} for name, n, us in rows[:most]],
    }


def _is_kernel(event: Any) -> bool:
    return bool(event.device_type == torch.autograd.DeviceType.CUDA)
