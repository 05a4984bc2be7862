"""Capture, restore and replay of random state: torch (CPU and CUDA), NumPy and Python."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mlo.ops import torch_versions

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Randomness:
    """The state of the random number generators. Replaying it gives the same dropout masks again.

    Attributes:
        cpu, cuda: states of torch's generators on the CPU and on one CUDA device.
        outside: states of the global generators of NumPy and Python, if a loss may draw from them.
    """

    cpu: torch.Tensor
    cuda: torch.Tensor | None = None
    outside: tuple[Any, Any] | None = None

    @staticmethod
    def seeded(seed: int) -> Randomness:
        """The state of all generators on the CPU after seeding them. The generators themselves do not change."""
        numpy_state = np.random.RandomState(seed % 2**32).get_state()
        outside = numpy_state, random.Random(seed).getstate()
        return Randomness(torch.Generator().manual_seed(seed).get_state(), None, outside)

    @staticmethod
    def of(state: dict[str, Any]) -> Randomness:
        """The state from what :meth:`portable` returned."""
        kind, keys, position, has_gauss, gauss = state["numpy"]
        version, words, gauss_next = state["python"]
        numpy_state = kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss
        return Randomness(state["torch"], None, (numpy_state, (version, tuple(words.tolist()), gauss_next)))

    def portable(self) -> dict[str, Any]:
        """The state on the CPU and of NumPy and Python, as tensors and plain values."""
        assert self.outside is not None
        (kind, keys, position, has_gauss, gauss), (version, words, gauss_next) = self.outside
        return {
            "torch": self.cpu,
            "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
            "python": [version, torch.tensor(words, dtype=torch.int64), gauss_next],
        }

    @staticmethod
    def capture(device: torch.device, outside: bool = False) -> Randomness:
        """The current state; ``device`` is the device of the modules."""
        return Randomness(torch.get_rng_state(), gpu_state(device), outside_state() if outside else None)

    def restore(self, device: torch.device) -> None:
        """Set the generators to this state."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            set_gpu_state(self.cuda, device)
        if self.outside is not None:
            np.random.set_state(self.outside[0])
            random.setstate(self.outside[1])


@contextmanager
def replay(randomness: Randomness | None, device: torch.device, outside: bool = False) -> Iterator[None]:
    """A context that starts from ``randomness`` (None: the current state) and restores the generators afterwards."""
    present = Randomness.capture(device, outside or (randomness is not None and randomness.outside is not None))
    if randomness is not None:
        randomness.restore(device)
    try:
        yield
    finally:
        present.restore(device)


def gpu_state(device: torch.device) -> torch.Tensor | None:
    """The state of a GPU's generator; None for another device.

    While a CUDA graph is recorded, it counts from the beginning of the graph. Older releases of torch cannot read it
    then, and the result is None; losses that draw are not recorded.
    """
    if device.type != "cuda" or (not torch_versions.RECORDS_DRAWS and torch.cuda.is_current_stream_capturing()):
        return None
    return torch.cuda.get_rng_state(device)


def set_gpu_state(state: torch.Tensor, device: torch.device) -> None:
    """Set the state of a GPU's generator, but not that of another device."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)


def outside_state() -> tuple[Any, Any]:
    """The states of the global generators of NumPy and Python."""
    return np.random.get_state(legacy=True), random.getstate()


def same_outside(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    """Whether two results of :func:`outside_state` are equal: nothing was drawn between them."""
    (_, keys, *rest), python = one
    (_, other_keys, *other_rest), other_python = other
    return rest == other_rest and python == other_python and bool(np.array_equal(keys, other_keys))


def global_state() -> dict[str, Any]:
    """The global random state of torch (CPU), NumPy and Python, as tensors and plain values."""
    return Randomness.capture(CPU, outside=True).portable()


def set_global_state(state: dict[str, Any]) -> None:
    """Restore what :func:`global_state` returned."""
    Randomness.of(state).restore(CPU)


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context in which all generators start from ``seed``; afterwards they are as they were before it."""
    present = Randomness.capture(CPU, outside=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    seed_everything(seed)
    try:
        yield
    finally:
        present.restore(CPU)
        for device, state in enumerate(cuda):
            torch.cuda.set_rng_state(state, device)


def derived_seed(seed: int, name: str) -> int:
    """A 32-bit seed made of the run's seed and the name of a part of it, so that no part depends on another one."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")
