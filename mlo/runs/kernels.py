"""Which kernels torch chooses during a run: those that give the same bits each time, or on a GPU the fastest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mlo.runs.job import Job

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def chosen_kernels(job: Job) -> Iterator[None]:
    """A context in which torch chooses kernels as the job's option ``deterministic`` says; restored afterwards.

    cuBLAS reads the environment variable when it is first used, so nothing should have used it before.
    """
    cudnn = torch.backends.cudnn
    benchmark, deterministic = cudnn.benchmark, cudnn.deterministic
    everywhere = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get(WORKSPACE)
    if job.deterministic:
        os.environ.setdefault(WORKSPACE, ":4096:8")
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic, cudnn.benchmark = True, False
    elif job.torch_device.type == "cuda":
        cudnn.benchmark = True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = benchmark, deterministic
        torch.use_deterministic_algorithms(everywhere, warn_only=warn_only)
        if workspace is None:
            os.environ.pop(WORKSPACE, None)
