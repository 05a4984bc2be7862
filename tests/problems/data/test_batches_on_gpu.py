"""Batches on a GPU, which is pretended: at most one copy to it for each, few kernels, and no read on the host."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.gpu.causes import TRANSFERS
from benchmarks.gpu.counting import Counting
from benchmarks.gpu.pretended import GPU, META, pretended_gpu
from mlo.levels.batches import open_stream
from problems.data.images import ArrayPixels, Part
from problems.data.options import Augmentation, Data
from problems.data.sources import LoadOptions, load_source

SEARCH = Augmentation(crop=4, flip=True)
FINAL = Augmentation(crop=4, flip=True, cutout=16)


class Waiting(TorchFunctionMode):
    """Counts the copies to the GPU that the host waits for."""

    def __init__(self):
        super().__init__()
        self.pinned, self.seen = set(), Counter()

    def __torch_function__(self, function, _, args=(), kwargs=None):
        if function is Tensor.pin_memory:
            self.pinned.add(id(args[0]))
        result = function(*args, **kwargs or {})
        if function is Tensor.to and args[0].device.type == "cpu" and result.device.type == "cuda":
            waits = id(args[0]) not in self.pinned or not (kwargs or {}).get("non_blocking")
            self.seen["blocking" if waits else "asynchronous"] += 1
        return result


def cifar(tmp_path, classes: int) -> Data:
    """A small data set of the form of CIFAR."""
    random, arrays = np.random.default_rng(0), {}
    for part, count in (("train", 400), ("test", 200)):
        arrays[f"{part}_images"] = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(count) % classes
    np.savez(tmp_path / f"cifar{classes}.npz", **arrays)
    sizes = {"train_size": 130, "validation_size": 130, "unlabeled_size": 130}
    return Data(source=f"cifar{classes}", root=str(tmp_path), **sizes)


@pytest.fixture
def gpu(monkeypatch):
    """The memory of the pretended GPU, in bytes, which a test may change."""
    properties = SimpleNamespace(total_memory=2**34)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return properties


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize(("augmentation", "launches"), [(None, 6), (SEARCH, 11), (FINAL, 15)])
@pytest.mark.usefixtures("gpu")
def test_a_batch_takes_one_copy_to_the_gpu_and_few_kernels(tmp_path, monkeypatch, classes, augmentation, launches):
    monkeypatch.setattr(Part, "statistics", lambda *_: (torch.ones(3), torch.ones(3)))  # the data set's are read once
    with pretended_gpu(), Waiting() as copies:
        splits = cifar(tmp_path, classes).splits(0, GPU)
        streams = [part.batches(64, augmentation) for part in (splits.train, splits.unlabeled, splits.validation)]
        copies.seen.clear()
        for stream in (open_stream(loader, "p") for loader in streams):
            stream.device = GPU
            for taken in range(4):  # two passes
                with Counting() as found:
                    images, labels = stream.next()
                begins = taken % 2 == 0  # then the order of the pass is copied too
                draws = augmentation is not None
                assert found.by_cause[TRANSFERS] == begins + draws
                assert found.launches == launches + begins
                assert (images.shape, images.dtype) == ((64, 3, 32, 32), torch.float32)
                assert (labels.shape, labels.dtype) == ((64,), torch.int64)
                assert images.is_cuda
                assert labels.is_cuda
        assert not copies.seen["blocking"]


def test_images_that_take_more_than_a_quarter_of_the_gpu_stay_on_the_host_and_are_pinned(tmp_path, gpu):
    data = cifar(tmp_path, 10)
    options = LoadOptions(tmp_path, device=GPU)
    needed = 400 * 3 * 32 * 32
    for memory, there in ((4 * needed, True), (4 * needed - 1, False)):
        gpu.total_memory = memory
        with pretended_gpu():
            loaded = load_source(data.source, options)
            assert loaded.labeled.pixels.device.type == ("cuda" if there else "cpu")
            assert loaded.test.pixels.device.type == "cuda"  # it is smaller
        assert loaded.labeled.pin_memory != there
        assert not loaded.test.pin_memory
        assert loaded.labeled.batches(8).pin_memory != there
    on_cpu = load_source(data.source, LoadOptions(tmp_path, device=torch.device("cpu"))).labeled
    assert on_cpu.pixels.device.type == "cpu"
    assert not on_cpu.pin_memory


def test_reading_in_order_copies_the_order_once():
    with META:
        array = torch.empty(100, 3, 8, 8, dtype=torch.uint8)
    with pretended_gpu():
        loader = Part.of(ArrayPixels(array), torch.arange(100)).in_order(30)
        with Counting() as found:
            assert [len(labels) for _, labels in loader] == [30, 30, 30, 10]
    assert found.by_cause[TRANSFERS] == 1
