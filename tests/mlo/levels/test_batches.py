"""Endless batches: from any source, starting over at its end, read ahead of time, and resumed at the same batch."""

from __future__ import annotations

import random
import weakref
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from mlo.errors import CheckpointError, ConfigError
from mlo.levels.batches import open_stream
from mlo.levels.transfers import to_device
from mlo.ops.rng import global_state
from mlo.training.recording import HeldBatches
from mlo.training.rounds import cast_batches


def numbers():
    yield from (1, 2, 3)


def noise():
    """Draws from all three global generators, as augmentation does."""
    for i in range(4):
        yield torch.tensor([i, torch.rand(()), np.random.rand(), random.random()])


def loader(workers: int = 0, generator: torch.Generator | None = None) -> DataLoader:
    data = TensorDataset(torch.arange(10.0))
    return DataLoader(data, batch_size=3, shuffle=True, num_workers=workers, generator=generator)


def by_index() -> DataLoader:
    data = TensorDataset(torch.arange(10.0))
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(5))
    return DataLoader(data, sampler=BatchSampler(sampler, 3, drop_last=True), batch_size=None)


SOURCES = {
    "list": lambda: [1, 2, 3],
    "generator function": lambda: numbers,
    "random generator function": lambda: noise,
    "loader": loader,
    "loader with a generator": lambda: loader(generator=torch.Generator().manual_seed(3)),
    "loader of whole batches": by_index,
    "mapping": lambda: {"one": loader(), "two": [1, 2]},
}


def flat(batch: object) -> list:
    if isinstance(batch, dict):
        return [x for part in batch.values() for x in flat(part)]
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    return [x for part in batch for x in flat(part)] if isinstance(batch, list | tuple) else [batch]


def opened(source: str, seed: int = 0):
    torch.manual_seed(seed)
    return open_stream(SOURCES[source](), "p")


def test_data_start_over_when_they_end():
    assert [opened("list").next() for _ in range(1)] == [1]
    stream = opened("generator function")
    assert [stream.next() for _ in range(7)] == [1, 2, 3, 1, 2, 3, 1]


def test_a_loader_is_shuffled_anew_each_time_and_shows_each_sample_once():
    stream = opened("loader")
    passes = [[x for _ in range(4) for x in flat(stream.next())] for _ in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(10))
    assert passes[0] != passes[1]


def test_a_mapping_gives_dictionaries_whose_parts_start_over_separately():
    stream = open_stream({"one": [1, 2], "two": numbers}, "p")
    assert [stream.next() for _ in range(4)] == [{"one": a, "two": b} for a, b in ((1, 1), (2, 2), (1, 3), (2, 1))]


def test_no_data_gives_none():
    assert open_stream(None, "p").next() is None


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("taken", [0, 2, 4, 9])
@pytest.mark.parametrize("ahead", [None, 1, 5])
def test_a_saved_position_gives_the_same_batches_again(source, taken, ahead):
    stream = opened(source)
    for _ in range(taken):
        stream.next()
    if ahead is not None:
        stream.peek(ahead)
    saved = stream.state_dict()
    expected = [flat(stream.next()) for _ in range(9)]
    resumed = opened(source, seed=99)
    resumed.load_state_dict(saved)
    assert [flat(resumed.next()) for _ in range(9)] == expected


@pytest.mark.parametrize("source", SOURCES)
def test_reading_ahead_changes_nothing(source):
    plain, curious = opened(source), opened(source)
    before = global_state()
    for ahead in (0, 6, 2):
        curious.peek(ahead)
    after = global_state()
    assert torch.equal(before["torch"], after["torch"])
    assert torch.equal(before["numpy"][1], after["numpy"][1])
    assert torch.equal(before["python"][1], after["python"][1])
    assert [flat(curious.next()) for _ in range(9)] == [flat(plain.next()) for _ in range(9)]


def test_peek_returns_what_next_will_return():
    stream = opened("random generator function")
    peeked = [flat(stream.peek(i)) for i in range(6)]
    assert [flat(stream.next()) for _ in range(6)] == peeked


def test_worker_processes_resume_too():
    torch.manual_seed(0)
    stream = open_stream(loader(workers=2), "p")
    stream.next()
    saved = stream.state_dict()
    expected = [flat(stream.next()) for _ in range(5)]
    resumed = open_stream(loader(workers=2), "p")
    resumed.load_state_dict(saved)
    assert [flat(resumed.next()) for _ in range(5)] == expected


def test_tensors_are_moved_wherever_they_are_in_a_batch():
    stream = open_stream([{"a": (torch.ones(2), "text")}], "p")
    stream.device = torch.device("meta")
    batch = stream.next()
    assert batch["a"][0].device.type == "meta"
    assert batch["a"][1] == "text"


@dataclass
class Pair:
    x: object
    y: object = None
    name: str = "pair"


@dataclass(frozen=True, slots=True)
class Frozen:
    x: object
    y: object = None


class Dictionary(dict):
    """A dictionary whose items are attributes, too."""

    def __init__(self, **items):
        super().__init__(items)
        self.__dict__.update(items)


class Holder:
    def __init__(self, x, size):
        self.x, self.size = x, size


class Texts(list):
    pass


class Slot:
    __slots__ = "value"  # a single name is not a list of letters

    def __init__(self, value):
        self.value = value


Named = namedtuple("Named", "x y")


class NamedByOne(Named):
    """A named tuple whose class takes other arguments than its fields."""

    def __new__(cls, x):
        return super().__new__(cls, x, None)


KINDS = {
    "dictionary": lambda t: {"x": t, "text": "a", "none": None},
    "user dictionary": lambda t: UserDict(x=t, text="a", none=None),
    "ordered dictionary": lambda t: OrderedDict(x=t, text="a"),
    "dictionary with defaults": lambda t: defaultdict(list, x=[t]),
    "subclass of a dictionary": lambda t: Dictionary(x=t, text="a"),
    "subclass of a list": lambda t: Texts([t, "a"]),
    "named tuple": lambda t: Named(t, None),
    "subclass of a named tuple": NamedByOne,
    "dataclass": lambda t: Pair(t),
    "frozen dataclass with slots": lambda t: Frozen(t),
    "namespace": lambda t: SimpleNamespace(x=t, y=None),
    "object": lambda t: Holder(t, 3),
    "nested": lambda t: [Pair(UserDict(x=(t, "a")), {"y": Frozen([t, None])}), None],
    "deque": lambda t: deque([t]),
}


def test_a_slot_whose_name_is_given_alone_is_found():
    assert to_device(Slot(torch.ones(2)), torch.device("meta")).value.device.type == "meta"


def contents(value: object) -> object:
    """What is in a batch, by plain containers."""
    if isinstance(value, torch.Tensor | str | int | None):
        return value
    if isinstance(value, dict | UserDict):
        return (
            type(value).__name__,
            {k: contents(v) for k, v in value.items()},
            vars(value) if type(value) is Dictionary else 0,
        )
    if isinstance(value, list | tuple | deque):
        return type(value).__name__, [contents(v) for v in value]
    names = value.__slots__ if isinstance(value, Frozen) else vars(value)
    return type(value).__name__, {name: contents(getattr(value, name)) for name in names}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", [lambda batch: [batch], lambda batch: lambda: iter([batch])], ids=["list", "stream"])
def test_tensors_are_moved_and_all_else_stays(kind, source):
    t = torch.ones(2)
    batch = KINDS[kind](t)
    stream = open_stream(source(batch), "p")
    stream.device = torch.device("meta")
    moved = stream.next()
    assert repr(contents(moved)) == repr(contents(KINDS[kind](t.to("meta"))))
    assert repr(contents(batch)) == repr(contents(KINDS[kind](t)))  # the user's own is as it was


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_cast_in_batches_of_any_kind(kind):
    (cast,) = cast_batches((KINDS[kind](torch.ones(2)),), torch.float64)
    assert repr(contents(cast)) == repr(contents(KINDS[kind](torch.ones(2).double())))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_any_kind_are_held_for_a_captured_round(kind):
    held = HeldBatches(open_stream([KINDS[kind](torch.full((2,), value)) for value in (1.0, 2.0)], "p"))
    first = held.peek()
    assert repr(contents(first)) == repr(contents(KINDS[kind](torch.ones(2))))
    assert held.fill()
    mine = held.next()
    held.move()
    assert held.fill()
    assert repr(contents(mine)) == repr(contents(KINDS[kind](torch.full((2,), 2.0))))  # in the same tensors


def test_a_packed_sequence_keeps_its_sizes():
    packed = pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    moved = to_device(packed, torch.device("meta"))
    assert (moved.data.device.type, moved.batch_sizes.device.type) == ("meta", "cpu")


def test_a_packed_sequence_keeps_the_order_of_its_parts():
    parts = [torch.ones(2, 2), torch.zeros(3, 2)]
    (packed,) = cast_batches((pack_sequence(parts, enforce_sorted=False),), torch.float64)
    torch.testing.assert_close([*unpack_sequence(packed)], [part.double() for part in parts])


class Linked:
    def __init__(self, x):
        self.x, self.within = x, [self]


class Watching:
    def __init__(self, x):
        self.x, self.owner = x, weakref.ref(type(self))


@pytest.mark.parametrize(
    ("holder", "name", "reason"),
    [
        (lambda t: {t}, "set", "sets have no order"),
        (lambda t: [Linked(t)], "Linked", "refers to itself"),
        (Watching, "Watching", "refers to itself, or to what holds it"),
        (lambda t: nn.Linear(2, 2), "Linear", "is a module"),
    ],
)
def test_tensors_that_cannot_be_reached_are_reported(holder, name, reason):
    batch = holder(torch.ones(2))
    stream = open_stream([batch], "p")
    assert stream.next() is batch  # nothing needs to be moved
    stream.device = torch.device("meta")
    with pytest.raises(ConfigError, match=f"'p': its batch holds tensors in a {name}.*{reason}.*a dataclass, or reg"):
        stream.next()


def test_other_data_than_the_checkpoints():
    long, short = open_stream(list(range(9)), "p"), open_stream([1, 2], "p")
    for _ in range(5):
        long.next()
    with pytest.raises(CheckpointError, match=r"'p': the checkpoint was saved after 5 batches .* ends after 2"):
        short.load_state_dict(long.state_dict())
    with pytest.raises(CheckpointError, match="'p': its data is of a different kind"):
        opened("loader").load_state_dict(long.state_dict())


def test_data_that_cannot_be_read_repeatedly():
    for data, message in [
        (iter([1]), "an iterator"),
        (7, "a int"),
        ({"x": zip([1], [2], strict=True)}, "'p: x': data is an iterator"),
        ((torch.ones(4, 2), torch.ones(4, 2)), "is a tuple of 2 tensors, .* write data=\\[\\(x, y\\)\\]"),
        ([torch.ones(4, 2), torch.ones(4)], "is a list of 2 tensors, .* write data=\\[\\(x, y\\)\\]"),
        ([torch.ones(4, 2), torch.ones(4, 1).long()], "is a list of 2 tensors"),
    ]:
        with pytest.raises(ConfigError, match=message):
            open_stream(data, "p")
    with pytest.raises(ConfigError, match="yields no batch"):
        open_stream(lambda: iter([]), "p").next()


def test_batches_of_a_list_are_moved_once():
    stream = open_stream([torch.ones(2), torch.zeros(2)], "p")
    stream.device = torch.device("meta")
    first, second, again = (stream.next() for _ in range(3))
    assert first.device.type == "meta"
    assert first is again
    assert first is not second


class Augmented(Sequence):
    """A sequence that draws each item when it is read."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError
        return index, torch.rand(()).item()


def test_a_sequence_that_draws_its_items_gives_one_batch_however_often_it_is_looked_at():
    torch.manual_seed(0)
    stream, state = open_stream(Augmented(), "p"), torch.get_rng_state()
    for _ in range(2):
        seen = [stream.peek(ahead) for ahead in range(4)]
        saved = stream.state_dict()
        assert seen == [stream.peek(ahead) for ahead in range(4)] == [stream.next() for _ in range(4)]
        stream.load_state_dict(saved)
        assert seen == [stream.next() for _ in range(4)]
    assert torch.equal(state, torch.get_rng_state())
