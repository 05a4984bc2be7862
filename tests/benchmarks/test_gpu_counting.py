"""Counting on tensors without data: kernel launches by cause, and no read of the GPU on the host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from two_levels import Following, Judging

import mlo
from benchmarks.gpu import causes
from benchmarks.gpu.counted import count_rounds, table
from benchmarks.gpu.counting import Counting, count_round, count_step
from benchmarks.gpu.pretended import META, HostReadError, pretended_gpu
from benchmarks.gpu.workload import SMOKE

SMALL = {"channels": 2, "cells": 3, "batch": 2, "size": 8}


def student() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))


def counted(function: Callable[[], object]) -> Counting:
    with pretended_gpu():
        return count_step(function, 0)


def on_gpu(*shape: int) -> Tensor:
    return torch.empty(shape, device=META)


def test_views_launch_nothing_and_other_operations_one_kernel() -> None:
    image, weight = on_gpu(2, 3, 8, 8), on_gpu(4, 3, 3, 3)
    found = counted(lambda: torch.conv2d(image.flip(-1).transpose(2, 3), weight)[:, 1:].relu().mean())
    assert found.by_operator == {"flip": 1, "convolution": 1, "relu": 1, "mean": 1}
    assert found.flop == 2 * (2 * 4 * 6 * 6) * (3 * 3 * 3)


def test_a_backward_pass_launches_a_kernel_for_each_gradient_of_a_convolution() -> None:
    image, weight = on_gpu(2, 3, 8, 8), on_gpu(4, 3, 3, 3).requires_grad_()
    loss = torch.conv2d(image, weight).sum()
    found = counted(lambda: torch.autograd.grad(loss, weight))
    assert found.by_operator == {"ones_like": 1, "convolution_backward": 1}
    assert set(found.by_cause) == {causes.BACKWARD}
    assert found.flop == 2 * (2 * 4 * 6 * 6) * (3 * 3 * 3)


@pytest.mark.parametrize(
    ("tensors", "kernels"),
    [
        (lambda: [on_gpu(3)] * 48, 1),
        (lambda: [on_gpu(3)] * 49, 2),  # of three lists, a kernel takes 48 tensors
        (lambda: [on_gpu(320 * 65_536)] * 2, 2),  # and 320 chunks
        (lambda: [on_gpu(320 * 65_536 + 1), on_gpu(3)], 2),
    ],
)
def test_an_operation_on_lists_launches_a_kernel_for_as_many_tensors_as_fit(
    tensors: Callable[[], list[Tensor]], kernels: int
) -> None:
    assert counted(lambda: torch._foreach_add(tensors(), tensors())).launches == kernels


def test_lists_of_tensors_with_different_strides_are_added_one_by_one() -> None:
    one, other = on_gpu(4, 1, 3, 3), on_gpu(4, 1, 3, 3).to(memory_format=torch.channels_last)
    assert counted(lambda: torch._foreach_add([one] * 20, [one] * 20)).launches == 1
    assert counted(lambda: torch._foreach_add([one] * 20, [one] * 19 + [other])).launches == 20


def test_bytes_are_those_of_inputs_and_results() -> None:
    wide = on_gpu(1, 5).expand(100, 5)
    assert counted(lambda: on_gpu(100, 5) * wide).bytes == 4 * (500 + 5 + 500)
    assert counted(lambda: on_gpu(100).unfold(0, 10, 1) + 1).bytes == 4 * (100 + 910)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool((x > 0).any()),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: torch.empty(3).copy_(x),
        lambda x: torch.cuda.synchronize(),
    ],
)
def test_a_read_on_the_host_is_an_error(read: Callable[[Tensor], object]) -> None:
    with pytest.raises(HostReadError):
        counted(lambda: read(on_gpu(3)))


def test_an_asynchronous_copy_to_the_host_is_a_transfer() -> None:
    found = counted(lambda: torch.empty(3).copy_(on_gpu(3), non_blocking=True))
    assert found.by_cause == {causes.TRANSFERS: 1}


def test_the_error_names_the_line_that_reads() -> None:
    class Reading(Following):
        def loss(self, batch, top):
            return super().loss(batch, top) * self.params["weight"].sum().item()

    with META:
        low, top, batch = nn.Linear(3, 2), nn.Linear(3, 2), torch.empty(4, 3)
    levels = [
        Reading("low", module=low, optimizer=torch.optim.SGD(low.parameters(), 0.1), data=[batch]),
        Judging("top", module=top, optimizer=torch.optim.SGD(top.parameters(), 0.1), data=[batch]),
    ]
    with pretended_gpu():
        engine = mlo.Engine(levels, device="cuda")
        with pytest.raises(HostReadError, match=r"reads a value .*/test_gpu_counting\.py:loss, line \d+"):
            count_step(engine.step)


@pytest.fixture(scope="module")
def small_round() -> Counting:
    return count_round(student, **SMALL)


def test_a_round_of_lbt_is_counted_by_cause_and_reads_nothing_on_the_host(small_round: Counting) -> None:
    found = small_round
    assert found.launches == sum(found.by_function.values()) == sum(found.by_operator.values())
    assert {causes.FORWARD, causes.BACKWARD, causes.OPTIMIZER, causes.GUARD} <= set(found.by_cause) <= {*causes.CAUSES}
    assert found.by_cause[causes.TRANSFERS] == 1  # the losses, once a round
    assert found.by_cause[causes.OTHER] < 10
    assert f"{found.launches} launches" in found.table()


def test_launches_do_not_depend_on_the_size_of_batches(small_round: Counting) -> None:
    other = count_round(student, **SMALL | {"batch": 3})
    assert small_round.by_operator == other.by_operator
    assert small_round.bytes < other.bytes


@pytest.mark.slow
def test_a_round_at_the_papers_size_costs_what_the_docs_state() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")
    counts = count_rounds()
    for row in table(counts).splitlines():
        assert row in page
    assert counts["engine"].launches < 1.05 * counts["by hand"].launches


@pytest.mark.slow
def test_a_search_also_makes_its_batches_and_the_round_by_hand_launches_no_more() -> None:
    engine, by_hand, darts = count_rounds(SMOKE).values()
    assert by_hand.launches <= engine.launches
    assert darts.launches < engine.launches
    assert engine.by_cause[causes.DATA] > 0
    assert engine.by_cause[causes.TRANSFERS] > 1
    assert by_hand.by_cause[causes.DATA] == by_hand.by_cause[causes.TRANSFERS] == 0
    assert all(count.by_cause[causes.OTHER] < 10 for count in (engine, by_hand, darts))


def test_the_table_has_a_row_for_each_cause(small_round: Counting) -> None:
    rows = table({"engine": small_round}).splitlines()
    assert rows[0] == "| | engine |"
    assert rows[2] == f"| kernel launches | **{small_round.launches:,}** |"
    assert len(rows) == 5 + len(causes.CAUSES)
