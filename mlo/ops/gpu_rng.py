"""The random state of a GPU: read and restored as usual, and while a CUDA graph is recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mlo.ops import torch_versions


class GpuRandom:
    """The default random number generator of a GPU.

    Attributes:
        generator: torch's.
        restored: how often its state was restored so far.
        graph: random numbers of the CUDA graph that is recorded at present.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator, self.restored = generator, 0
        self.graph: GraphRandom | None = None

    def state(self) -> Tensor | int:
        """The present state, for :meth:`restore`; while a graph is recorded, an offset in the graph."""
        return self.generator.get_state() if self.graph is None else self.graph.offset()

    def restore(self, state: Tensor | int) -> None:
        """Draw from this state on."""
        self.restored += 1
        if isinstance(state, int):
            assert self.graph is not None
            self.graph.go_to(state)
        else:
            self.generator.set_state(state)


class GraphRandom:
    """Random numbers in one CUDA graph: each replay draws those that usual operations would draw in its place.

    While a graph is recorded, the default generator cannot be set to a state, but it can go on with the state of
    another generator. So each restored state is that of a further generator. These are set before each replay: to the
    state of the default generator, moved on by their offset in the graph. Then the default generator moves on.

    Args:
        gpu: where numbers are drawn.
        restored: how often a state is restored while the graph is recorded, at most.
    """

    def __init__(self, gpu: GpuRandom, restored: int) -> None:
        self._gpu, self._default = gpu, gpu.generator
        # none can be made while a graph is recorded
        self._free = [gpu.generator.clone_state() for _ in range(restored + 1)]
        self._used: list[tuple[torch.Generator, int]] = []  # with their offsets in the graph
        self._end = 0

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """A context in which the graph is recorded. The default generator is as before afterwards."""
        own = self._default.graphsafe_get_state()
        self._gpu.graph = self
        try:
            self._start(0)
            yield
            self._end = self.offset()
        finally:
            self._gpu.graph = None
            self._default.graphsafe_set_state(own)

    def offset(self) -> int:
        """How far usual operations would have moved the default generator since the recording began."""
        if not torch_versions.RECORDS_DRAWS:
            return 0
        _, _, in_graph = self._default.philox_state(0)
        return self._used[-1][1] + int(in_graph)

    def go_to(self, offset: int) -> None:
        """Draw from this offset on."""
        if offset == self.offset():
            return
        generator, start = self._used[-1]
        if self.offset() == start:  # it has drawn nothing
            self._used[-1] = generator, offset
        else:
            self._start(offset)

    def _start(self, offset: int) -> None:
        if not self._free:
            raise RuntimeError("it repeats more evaluations than the rounds before it")
        self._used.append((self._free.pop(), offset))
        self._default.graphsafe_set_state(self._used[-1][0])

    def before_replay(self) -> None:
        """Set the generators for the next replay."""
        state = self._default.get_state()
        for generator, offset in self._used:
            generator.set_state(state)
            if offset:
                generator.philox_state(offset)
        if self._end:
            self._default.philox_state(self._end)


_GPUS: dict[int, GpuRandom] = {}


def gpu_random(device: torch.device) -> GpuRandom | None:
    """That of a CUDA device; None for other devices."""
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _GPUS:
        torch.cuda.init()
        _GPUS[index] = GpuRandom(torch.cuda.default_generators[index])
    return _GPUS[index]
