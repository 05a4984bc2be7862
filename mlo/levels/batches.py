"""Endless, resumable streams of batches from a DataLoader, a list or a generator function."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from mlo.errors import CheckpointError, ConfigError
from mlo.levels.transfers import Arriving, from_host, to_device
from mlo.ops.rng import CPU, Randomness

_State = tuple[Randomness, list[torch.Tensor]]  # of the global generators and of those of DataLoaders
Data = Iterable[Any] | Callable[[], Iterable[Any]] | Mapping[str, Any] | None


class Batches(Protocol):
    """An endless stream of batches, as the engine uses it."""

    device: torch.device | None

    def generators(self) -> list[torch.Generator]:
        """The ``torch.Generator`` objects of the user's DataLoaders."""

    def peek(self, ahead: int = 0) -> Any:
        """The batch that :meth:`next` will return after ``ahead`` more calls; the position does not change."""

    def next(self) -> Any:
        """The next batch. At the end, the data starts over."""

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, as plain values and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position."""


def open_stream(data: Data, owner: str) -> Batches:
    """An endless stream of batches from ``data``.

    Args:
        data: an iterable of batches (a DataLoader, a list, ...); a function without arguments that returns one (a
            generator function); a mapping {name: any of these}, whose batches are dictionaries and whose parts each
            start over when they end; or None, for a problem without data (its batch is None).
        owner: the name of the problem, for messages.

    Raises:
        ConfigError: if ``data`` is none of these; if it is an iterator, which can be read only once; or if it is a
            tuple of tensors, or a list of tensors of different kinds, which is probably meant as one batch.
    """
    if isinstance(data, Mapping):
        return _MergedStream({name: open_stream(part, f"{owner}: {name}") for name, part in data.items()})
    if data is None:
        data = [None]
    if isinstance(data, Iterator):
        raise ConfigError(
            f"problem {owner!r}: data is an iterator ({type(data).__name__}), which can be read only once; "
            "pass a DataLoader, a list, or a generator function (without calling it)"
        )
    if isinstance(data, tuple | list) and len(data) > 1 and all(isinstance(part, torch.Tensor) for part in data):
        kinds = {(part.dim(), part.dtype) for part in data}
        if isinstance(data, tuple) or len(kinds) > 1:  # batches of one problem are of one kind
            raise ConfigError(
                f"problem {owner!r}: data is a {type(data).__name__} of {len(data)} tensors, which would be read as "
                f"{len(data)} batches; write data=[(x, y)] for a single batch, or pass a DataLoader over "
                "TensorDataset(x, y)"
            )
    if not callable(data) and not isinstance(data, Iterable):
        raise ConfigError(
            f"problem {owner!r}: data is a {type(data).__name__}; pass an iterable of batches (a DataLoader, a list), "
            "a generator function, or a mapping of these"
        )
    # another sequence may load a batch, or draw one, each time that it is asked for it
    if isinstance(data, list | tuple) and type(data) in (list, tuple):
        return _ListStream(data, owner)
    return _Stream(data, owner)


class _ListStream:
    """The batches of a list, in turn. They are kept on the device, so that each is moved only once."""

    def __init__(self, data: Sequence[Any], owner: str) -> None:
        self.device: torch.device | None = None
        self._data, self._owner, self._index = data, owner, 0
        self._moved: dict[int, Any] = {}

    def generators(self) -> list[torch.Generator]:
        return []

    def peek(self, ahead: int = 0) -> Any:
        if not len(self._data):
            raise _empty(self._owner)
        index = (self._index + ahead) % len(self._data)
        if self.device is None or self.device.type == "cpu":
            return self._data[index]
        if index not in self._moved:
            self._moved[index] = to_device(self._data[index], self.device, self._owner)
        return self._moved[index]

    def next(self) -> Any:
        batch = self.peek()
        self._index = self._index % len(self._data) + 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"start": {}, "index": self._index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["start"]:
            raise _other_kind(self._owner)
        if state["index"] > len(self._data):
            raise _too_short(self._owner, state["index"], len(self._data))
        self._index = state["index"]


class _Stream:
    """Batches of one data source.

    The source draws its random numbers from a random state that belongs to the stream. So reading batches ahead of time
    changes nothing else, and the position (the random state at the start of the epoch, and the number of batches since)
    is all that a checkpoint needs.

    If batches are copied from the host to a GPU, the next one is read when one is taken, so that its copy runs at the
    same time as the computations on this one.
    """

    def __init__(self, data: Iterable[Any] | Callable[[], Iterable[Any]], owner: str) -> None:
        self.device: torch.device | None = None
        self._data = data
        self._owner = owner
        self._generators = _generators_of(data)
        self._ahead: deque[tuple[_State, int, Arriving]] = deque()
        self._copies: torch.cuda.Stream | None = None
        self._iterator: Iterator[Any] | None = None
        self._index = 0
        self._random = Randomness.seeded(int(torch.randint(2**62, ())))
        self._start = self._random_state()

    def generators(self) -> list[torch.Generator]:
        return self._generators

    def peek(self, ahead: int = 0) -> Any:
        while len(self._ahead) <= ahead:
            self._ahead.append(self._fetch())
        return self._ahead[ahead][2].get()

    def next(self) -> Any:
        batch = self.peek()
        self._ahead.popleft()
        if self._copies is not None and not self._ahead:
            self._ahead.append(self._fetch())
        return batch

    def state_dict(self) -> dict[str, Any]:
        (random, generators), index = self._ahead[0][:2] if self._ahead else (self._start, self._index)
        return {"start": {"global": random.portable(), "generators": generators}, "index": index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "generators" not in state["start"] or len(state["start"]["generators"]) != len(self._generators):
            raise _other_kind(self._owner)
        self._ahead.clear()
        self._random = Randomness.of(state["start"]["global"])
        for generator, saved in zip(self._generators, state["start"]["generators"], strict=True):
            generator.set_state(saved)
        self._begin()
        with self._own_randomness():
            for seen in range(state["index"]):
                if next(self._pass(), _END) is _END:
                    raise _too_short(self._owner, state["index"], seen)
        self._index = state["index"]

    def _fetch(self) -> tuple[_State, int, Arriving]:
        with self._own_randomness():
            batch = next(self._pass(), _END)
        if batch is _END:
            self._begin()
            with self._own_randomness():
                batch = next(self._pass(), _END)
            if batch is _END:
                raise _empty(self._owner)
        start, index, device = self._start, self._index, self.device or CPU
        self._index += 1
        if self._copies is None and from_host(batch, device):
            self._copies = torch.cuda.Stream(device)
        return start, index, Arriving(batch, device, self._owner, self._copies)

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
        outside = Randomness.capture(CPU, outside=True)
        self._random.restore(CPU)
        try:
            yield
        finally:
            self._random = Randomness.capture(CPU, outside=True)
            outside.restore(CPU)

    def _random_state(self) -> _State:
        return self._random, [generator.get_state() for generator in self._generators]


class _MergedStream:
    """Several data sources side by side: a batch is {name: batch of that source}."""

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


def _empty(owner: str) -> ConfigError:
    return ConfigError(f"problem {owner!r}: its data yields no batch; pass data with at least one")


def _other_kind(owner: str) -> CheckpointError:
    return CheckpointError(f"problem {owner!r}: its data is of a different kind than in the checkpoint")


def _too_short(owner: str, index: int, length: int) -> CheckpointError:
    return CheckpointError(
        f"problem {owner!r}: the checkpoint was saved after {index} batches of an epoch, but the data ends after "
        f"{length}; resume with the data that the run started with"
    )


def _generators_of(data: object) -> list[torch.Generator]:
    """The ``torch.Generator`` objects that the user passed to a DataLoader or its samplers."""
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
