"""Random state as a value: captured, put back, and kept apart for each source of randomness."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Randomness:
    """The state of random generators; replayed, it draws the same dropout masks.

    Attributes:
        cpu, cuda: of torch's generators, of the CPU and of one CUDA device.
        outside: of NumPy's and Python's global ones, where a loss draws from them.
    """

    cpu: torch.Tensor
    cuda: torch.Tensor | None = None
    outside: tuple[Any, Any] | None = None

    @staticmethod
    def capture(device: torch.device, outside: bool = False) -> Randomness:
        """The state at this moment; ``device`` is where the modules are."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return Randomness(torch.get_rng_state(), cuda, outside_state() if outside else None)

    def restore(self, device: torch.device) -> None:
        """Make the generators go on from this state."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)
        if self.outside is not None:
            np.random.set_state(self.outside[0])
            random.setstate(self.outside[1])


@contextmanager
def replay(randomness: Randomness | None, device: torch.device, outside: bool = False) -> Iterator[None]:
    """Run the body from ``randomness`` (None: from the present state) and leave the generators as they were."""
    present = Randomness.capture(device, outside or (randomness is not None and randomness.outside is not None))
    if randomness is not None:
        randomness.restore(device)
    try:
        yield
    finally:
        present.restore(device)


def outside_state() -> tuple[Any, Any]:
    """The state of NumPy's and Python's global generators."""
    return np.random.get_state(legacy=True), random.getstate()


def same_outside(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    """Whether nothing was drawn between two :func:`outside_state`."""
    (_, keys, *rest), python = one
    (_, other_keys, *other_rest), other_python = other
    return rest == other_rest and python == other_python and bool(np.array_equal(keys, other_keys))


def global_state() -> dict[str, Any]:
    """Torch's (CPU), NumPy's and Python's global random state, in types that load without executing anything."""
    return _portable(torch.get_rng_state(), np.random.get_state(legacy=True), random.getstate())


def seeded_state(seed: int) -> dict[str, Any]:
    """The :func:`global_state` that seeding all three with ``seed`` would give; nothing global changes."""
    torch_state = torch.Generator().manual_seed(seed).get_state()
    return _portable(torch_state, np.random.RandomState(seed % 2**32).get_state(), random.Random(seed).getstate())


def set_global_state(state: dict[str, Any]) -> None:
    """Put back what :func:`global_state` returned."""
    torch.set_rng_state(state["torch"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss_next))


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _portable(torch_state: torch.Tensor, numpy_state: Any, python_state: Any) -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = numpy_state
    version, words, gauss_next = python_state
    return {
        "torch": torch_state,
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss_next],
    }
