"""Long runs: memory, tensors and open files are those of the first rounds, for every estimator."""

from __future__ import annotations

import gc
import os
import sys

import pytest
import torch
from recorded_levels import Fit, Judge
from torch.utils.data import DataLoader

import mlo
from mlo.options import registry

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
linux = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
WARM_UP, ROUNDS = 300, 1000
LEAK = 2**20 * 8  # bytes; what grows by less is found by the number of tensors


def used() -> tuple[int, int, int]:
    """(bytes of memory, tensors, open files) of this process."""
    gc.collect()
    tensors = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGESIZE"), tensors, len(os.listdir("/proc/self/fd"))


def data(workers: int):
    batches = [(torch.randn(4, 3).double(), torch.randn(4, 2).double()) for _ in range(500)]
    return DataLoader(batches, batch_size=None, shuffle=True, num_workers=workers, persistent_workers=bool(workers))


def engine(estimator: str, workers: int) -> mlo.Engine:
    torch.manual_seed(0)
    low, top = torch.nn.Linear(3, 2).double(), torch.nn.Linear(1, 2, bias=False).double()
    return mlo.Engine(
        [
            Fit("low", module=low, optimizer=torch.optim.SGD(low.parameters(), 0.01, 0.5), data=data(workers)),
            Judge("top", module=top, optimizer=torch.optim.Adam(top.parameters(), 0.001), data=data(workers)),
        ],
        estimator,
        device="cpu",
    )


def check(step, rounds):
    for _ in range(WARM_UP):
        step()
    memory, tensors, files = used()
    for _ in range(rounds):
        step()
    after = used()
    assert after[1] <= tensors + 10
    assert after[2] <= files
    assert after[0] - memory < LEAK


@linux
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("estimator", sorted(registry.entries(registry.ESTIMATORS)))
def test_nothing_grows_with_the_rounds(estimator, workers):
    check(engine(estimator, workers).step, ROUNDS)


@linux
def test_a_tensor_a_round_is_found():
    one, kept = engine("one_step", 0), []

    def step():
        one.step()
        kept.append(torch.zeros(1000))

    with pytest.raises(AssertionError):
        check(step, 500)
