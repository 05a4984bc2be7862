"""Endless, resumable batches from whatever the user trains on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from mlo.errors import CheckpointError, ConfigError
from mlo.ops.rng import global_state, seeded_state, set_global_state

Data = Iterable[Any] | Callable[[], Iterable[Any]] | Mapping[str, Any] | None


class Batches(Protocol):
    """What an engine needs of a source of batches."""

    device: torch.device | None

    def generators(self) -> list[torch.Generator]:
        """The generators of the user's that its sources draw from."""

    def peek(self, ahead: int = 0) -> Any:
        """The batch that the ``ahead``-th next call of :meth:`next` will give."""

    def next(self) -> Any:
        """The next batch; the data begins again when it ends."""

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain values and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position."""


def open_stream(data: Data, owner: str) -> Batches:
    """Batches without end from ``data``.

    Args:
        data: an iterable of batches (DataLoader, list, ...), a function without arguments that returns one (a
            generator function), a mapping {name: such data} whose batches come as dictionaries, each part begun again
            by itself, or None for a problem that needs no data (its batch is None).
        owner: the name of the problem, for messages.

    Raises:
        ConfigError: if ``data`` is nothing of these, an iterator, which could be walked only once, or a bare tuple of
            tensors, which is meant for one batch.
    """
    if isinstance(data, Mapping):
        return _MergedStream({name: open_stream(part, f"{owner}: {name}") for name, part in data.items()})
    if data is None:
        data = [None]
    if isinstance(data, Iterator):
        raise ConfigError(
            f"problem {owner!r}: data is an iterator ({type(data).__name__}), which can be walked only once; "
            "pass a DataLoader, a list, or the generator function itself (without calling it)"
        )
    if isinstance(data, tuple) and len(data) > 1 and all(isinstance(part, torch.Tensor) for part in data):
        raise ConfigError(
            f"problem {owner!r}: data is a tuple of {len(data)} tensors, which would be taken for {len(data)} batches; "
            "write [(x, y)] for one batch of them, or give a DataLoader over TensorDataset(x, y)"
        )
    if not callable(data) and not isinstance(data, Iterable):
        raise ConfigError(
            f"problem {owner!r}: data is a {type(data).__name__}; pass an iterable of batches (a DataLoader, a list), "
            "a generator function, or a mapping of these"
        )
    return _Stream(data, owner)


class _Stream:
    """Batches of one source.

    Whatever the source draws at random comes from a random state of the stream's own, so looking ahead changes
    nothing else, and the position (start of the pass, batches since) is all there is to save.
    """

    def __init__(self, data: Iterable[Any] | Callable[[], Iterable[Any]], owner: str) -> None:
        self.device: torch.device | None = None
        self._data = data
        self._owner = owner
        self._draws = not isinstance(data, Sequence)
        self._generators = _generators_of(data)
        self._ahead: deque[tuple[dict[str, Any], int, Any]] = deque()
        self._moved: dict[int, Any] = {}
        self._iterator: Iterator[Any] | None = None
        self._index = 0
        self._random = seeded_state(int(torch.randint(2**62, ()))) if self._draws else {}
        self._start = self._random_state()

    def generators(self) -> list[torch.Generator]:
        return self._generators

    def peek(self, ahead: int = 0) -> Any:
        while len(self._ahead) <= ahead:
            self._ahead.append(self._fetch())
        return self._ahead[ahead][2]

    def next(self) -> Any:
        self.peek()
        return self._ahead.popleft()[2]

    def state_dict(self) -> dict[str, Any]:
        start, index = self._ahead[0][:2] if self._ahead else (self._start, self._index)
        return {"start": start, "index": index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if bool(state["start"]) != self._draws or len(state["start"].get("generators", ())) != len(self._generators):
            raise CheckpointError(f"problem {self._owner!r}: its data is of another kind than in the checkpoint")
        self._ahead.clear()
        self._set_random_state(state["start"])
        self._begin()
        with self._own_randomness():
            for seen in range(state["index"]):
                if next(self._pass(), _END) is _END:
                    raise CheckpointError(
                        f"problem {self._owner!r}: the checkpoint stands after {state['index']} batches of a pass, but "
                        f"its data ends after {seen}; resume with the data that the run began with"
                    )
        self._index = state["index"]

    def _fetch(self) -> tuple[dict[str, Any], int, Any]:
        with self._own_randomness():
            batch = next(self._pass(), _END)
        if batch is _END:
            self._begin()
            with self._own_randomness():
                batch = next(self._pass(), _END)
            if batch is _END:
                raise ConfigError(f"problem {self._owner!r}: its data yields no batch")
        place = (self._start, self._index)
        self._index += 1
        return *place, self._placed(batch, place[1])

    def _placed(self, batch: Any, index: int) -> Any:
        """The batch on the device; those of a list stay there, so that each is moved once."""
        if self.device is None or self.device.type == "cpu":
            return batch
        if index in self._moved:
            return self._moved[index]
        batch = tree_map_only(torch.Tensor, lambda t: t.to(self.device, non_blocking=True), batch)
        if not self._draws:
            self._moved[index] = batch
        return batch

    def _pass(self) -> Iterator[Any]:
        if self._iterator is None:
            self._iterator = iter(self._data() if callable(self._data) else self._data)
        return self._iterator

    def _begin(self) -> None:
        self._iterator = None
        self._start = self._random_state()
        self._index = 0

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        if not self._draws:
            yield
            return
        outside = global_state()
        set_global_state(self._random)
        try:
            yield
        finally:
            self._random = global_state()
            set_global_state(outside)

    def _random_state(self) -> dict[str, Any]:
        if not self._draws:
            return {}
        return {"global": self._random, "generators": [g.get_state() for g in self._generators]}

    def _set_random_state(self, state: dict[str, Any]) -> None:
        if self._draws:
            self._random = state["global"]
            for generator, saved in zip(self._generators, state["generators"], strict=True):
                generator.set_state(saved)


class _MergedStream:
    """Several sources side by side: a batch is {name: batch of that source}."""

    def __init__(self, parts: Mapping[str, Batches]) -> None:
        self._parts = dict(parts)

    @property
    def device(self) -> torch.device | None:
        return next(iter(self._parts.values())).device

    @device.setter
    def device(self, device: torch.device | None) -> None:
        for part in self._parts.values():
            part.device = device

    def generators(self) -> list[torch.Generator]:
        return [generator for part in self._parts.values() for generator in part.generators()]

    def peek(self, ahead: int = 0) -> dict[str, Any]:
        return {name: part.peek(ahead) for name, part in self._parts.items()}

    def next(self) -> dict[str, Any]:
        return {name: part.next() for name, part in self._parts.items()}

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts.items():
            part.load_state_dict(state[name])


_END = object()


def _generators_of(data: object) -> list[torch.Generator]:
    """The generators that a DataLoader's shuffling draws from, when the user gave it some."""
    if not isinstance(data, DataLoader):
        return []
    found: list[torch.Generator] = []
    holders: list[object] = [data]
    while holders:
        holder = holders.pop()
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator) and all(generator is not other for other in found):
            found.append(generator)
        holders += [h for h in (getattr(holder, a, None) for a in ("sampler", "batch_sampler")) if h is not None]
    return found
