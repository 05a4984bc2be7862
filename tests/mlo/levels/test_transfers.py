"""Batches on their way to a GPU: through pinned memory, in a stream of their own, one ahead. The GPU is pretended."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.gpu.pretended import GPU, META, pretended_gpu
from mlo.levels.batches import open_stream
from mlo.levels.transfers import to_device


class Copies(TorchFunctionMode):
    """Counts how tensors reach the GPU."""

    def __init__(self):
        super().__init__()
        self.seen, self.pinned = Counter(), set()

    def __torch_function__(self, function, _, args=(), kwargs=None):
        options = kwargs or {}
        if function is Tensor.pin_memory:
            self.pinned.add(id(args[0]))
        if function is Tensor.to and args[0].device.type == "cpu":
            assert options.get("non_blocking")
            self.seen["pinned" if id(args[0]) in self.pinned else "pageable"] += 1
        return function(*args, **options)


@contextmanager
def watched():
    """A pretended GPU; counts the copies to it, and the events that the computations wait for."""
    with pretended_gpu(), Copies() as copies:
        torch.cuda.current_stream().wait_event = lambda _: copies.seen.update(waits=1)
        with mock.patch.object(Tensor, "record_stream", side_effect=lambda _: copies.seen.update(recorded=1)):
            yield copies.seen


def read(source):
    """A stream to the GPU, and the numbers of the batches that it has read."""
    numbers = []

    def data():
        for number in range(4):
            numbers.append(number)
            yield source(number)

    stream = open_stream(data, "p")
    stream.device = GPU
    return stream, numbers


def test_a_copy_to_a_gpu_is_asynchronous_from_pinned_memory():
    batch = {"a": (torch.ones(2), "text"), "b": torch.ones(2).to_sparse()}
    with watched() as seen:
        moved = to_device(batch, GPU)
        assert moved["a"][0].is_cuda
    assert moved["a"][1] == "text"
    assert seen == {"pinned": 1, "pageable": 1}


def test_the_next_batch_is_copied_while_the_gpu_works_on_this_one():
    with watched() as seen:
        stream, numbers = read(lambda number: (torch.ones(2), torch.ones(number + 1)))
        first = stream.peek()
        assert (numbers, seen) == ([0], {"pinned": 2, "waits": 1, "recorded": 2})
        assert stream.peek() is stream.next() is first
        assert (numbers, seen) == ([0, 1], {"pinned": 4, "waits": 1, "recorded": 2})  # the copy of 1 has begun
        assert [len(stream.next()[1]) for _ in range(5)] == [2, 3, 4, 1, 2]
        assert (numbers, seen["waits"]) == ([0, 1, 2, 3, 0, 1, 2], 6)


def test_batches_that_are_on_the_gpu_are_not_read_ahead():
    with META:
        batch = torch.ones(2)
    with watched() as seen:
        stream, numbers = read(lambda _: batch)
        assert stream.next() is stream.next() is batch
    assert numbers == [0, 1]
    assert not seen


@pytest.mark.parametrize("taken", [1, 3, 6])
def test_a_position_does_not_count_the_batch_that_was_read_ahead(taken):
    with watched():
        stream, _ = read(lambda number: torch.ones(number + 1))
        for _ in range(taken):
            stream.next()
        saved = stream.state_dict()
        resumed, _ = read(lambda number: torch.ones(number + 1))
        resumed.load_state_dict(saved)
        assert [len(resumed.next()) for _ in range(5)] == [(taken + i) % 4 + 1 for i in range(5)]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_from_the_host_have_their_values_on_a_gpu():
    torch.manual_seed(0)
    stream, _ = read(lambda number: (torch.full((1000, 1000), float(number)), number))
    for expected in range(12):
        values, number = stream.next()
        assert number == expected % 4
        busy = values @ values  # while the next batch arrives
        assert torch.equal(values.cpu(), torch.full((1000, 1000), float(number)))
        assert busy[0, 0] == 1000 * number**2
