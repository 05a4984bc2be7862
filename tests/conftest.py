"""Fixtures for all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial

os.environ["OMP_NUM_THREADS"] = "1"  # small tensors gain nothing by more, and lose much where cores are shared

import pytest
import torch
from replaying import Drawing, Generator, emulated_state, reading, record

from mlo.cli import main as cli
from mlo.hypergradient import solvers
from mlo.levels.batches import _Stream
from mlo.ops import rng, vectors
from mlo.ops.tf32 import Tf32
from mlo.training import engine as engine_module
from mlo.training import recording
from mlo.training.captured import Captured
from mlo.training.commit import Updater

torch.set_num_threads(1)


LONG = ("slow", "kernels", "processes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests come first: with several workers, none is left alone with one of them at the end."""
    long = {item.path for item in items if any(item.get_closest_marker(name) for name in LONG)}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of the tests: a GPU if there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return torch.device(request.param)


@pytest.fixture
def float64() -> Iterator[None]:
    """New tensors in double precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines capture on the CPU, and check losses as on a GPU."""
    monkeypatch.setattr(engine_module, "Updater", lambda device, deferred: Updater(device, deferred=True))
    monkeypatch.setattr(engine_module, "Captured", partial(Captured, record=record))
    monkeypatch.setattr(engine_module, "refuse_capture", lambda device: None)
    monkeypatch.setattr(engine_module, "Tf32", lambda steps, gpu: Tf32(steps))
    for module in (vectors, solvers):
        monkeypatch.setattr(module, "readable", lambda tensor: False)
    Drawing.default = Generator()
    monkeypatch.setattr(_Stream, "_fetch", reading()(_Stream._fetch))
    for module in (rng, recording):
        monkeypatch.setattr(module, "gpu_state", emulated_state)
        monkeypatch.setattr(module, "set_gpu_state", lambda state, device: Drawing.default.set_state(state))


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple]:
    """Run a command line in this process, which starts in no time: (exit code, standard output, standard error)."""
    monkeypatch.setenv("COLUMNS", "100")

    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mlo", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as done:
            code = done.code
        text = capsys.readouterr()
        return code, text.out, text.err

    return command
