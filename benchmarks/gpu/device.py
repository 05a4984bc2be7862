"""Section `device`: what is measured on, and its own limits."""

from __future__ import annotations

import platform
import shutil
import subprocess

import torch

from benchmarks.gpu.session import Session
from benchmarks.gpu.timing import captured, median_seconds, set_precision

LAUNCHES = 2000


def measure(session: Session) -> None:
    """Name, driver and memory; throughput of matrix products; memory bandwidth; cost of a launch."""
    device = session.device
    session.note("python", platform.python_version())
    session.note("torch", torch.__version__)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        session.note("name", properties.name)
        session.note("memory_gib", round(properties.total_memory / 2**30, 1))
        session.note("multiprocessors", properties.multi_processor_count)
        session.note("cuda", torch.version.cuda)
        session.note("cudnn", torch.backends.cudnn.version())
        session.note("driver", _driver())
    else:
        session.note("name", platform.processor() or platform.machine())
    session.note("copy_tb_s", copy_bandwidth(session))
    products = {"float32": (torch.float32, False), "tf32": (torch.float32, True), "bfloat16": (torch.bfloat16, False)}
    for name, (dtype, tf32) in products.items():
        with session.attempt(f"{name}_tflop_s"):
            session.note(f"{name}_tflop_s", _product_throughput(session, dtype, tf32))
    if device.type == "cuda":
        _launch_costs(session)
    else:
        session.skip("launch_us")


def copy_bandwidth(session: Session) -> float:
    """Of a copy on the device, in TB/s, reading and writing counted."""
    source = torch.randn(2**18 if session.smoke else 2**28, device=session.device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), session.device, 0.01 if session.smoke else 1.0)
    return round(2 * source.nbytes / seconds / 1e12, 3)


def _product_throughput(session: Session, dtype: torch.dtype, tf32: bool) -> float:
    set_precision(tf32)
    side = 128 if session.smoke else 8192
    matrix = torch.randn(side, side, device=session.device, dtype=dtype)
    seconds = median_seconds(lambda: matrix @ matrix, session.device, 0.01 if session.smoke else 1.0)
    return round(2 * side**3 / seconds / 1e12, 3)


def _launch_costs(session: Session) -> None:
    small = torch.zeros(1, device=session.device)

    def many() -> None:
        for _ in range(LAUNCHES):
            small.add_(1)

    session.note("launch_us", round(1e6 * median_seconds(many, session.device, 1.0) / LAUNCHES, 2))
    graph = captured(many)
    session.note("launch_in_graph_us", round(1e6 * median_seconds(graph.replay, session.device, 1.0) / LAUNCHES, 2))


def _driver() -> str:
    """The driver's version, from nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return "unknown: there is no nvidia-smi"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return done.stdout.strip().partition("\n")[0] or f"unknown: {done.stderr.strip()[:200]}"
