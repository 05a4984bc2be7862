"""Endless batches: from any source, starting over at its end, read ahead of time, and resumed at the same batch."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from mlo.errors import CheckpointError, ConfigError
from mlo.levels.batches import open_stream
from mlo.ops.rng import global_state


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
        ((torch.ones(4, 2), torch.ones(4)), "is a tuple of 2 tensors, .* write \\[\\(x, y\\)\\]"),
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
