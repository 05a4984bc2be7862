"""The round by hand takes the engine's steps, and reads nothing on the host."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import mlo
from benchmarks import lbt_step
from benchmarks.gpu.counting import count_round, count_step
from benchmarks.gpu.hand_round import HandRound
from benchmarks.gpu.pretended import META, pretended_gpu
from benchmarks.lbt_step import Task, make_task
from problems.search.students import make_student

SMALL = {"channels": 2, "cells": 3, "batch": 4, "size": 8}


def task() -> Task:
    return make_task(lambda: make_student("small", 3, 10, 8), **SMALL)


def tensors(of: Task) -> list[Tensor]:
    networks = of.teacher, of.student, of.architecture
    return [tensor.detach() for network in networks for tensor in (*network.parameters(), *network.buffers())]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("held", "clip_norm"),
    [
        (False, 0.05),
        (True, None),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(False, None), (True, 0.05), (False, 5.0)]),
    ],
)
def test_it_leads_to_the_parameters_and_buffers_of_the_engine(held: bool, clip_norm: float | None) -> None:
    by_engine = task()
    by_hand = copy.deepcopy(by_engine)
    levels = lbt_step.problems(by_engine, held=("arch",) if held else ())
    for level in levels[:2]:
        level.clip_norm = clip_norm
    engine, loop = mlo.Engine(levels, "darts", device="cpu"), HandRound(by_hand, clip_norm, held)
    for _ in range(2):
        engine.step()
        loop.step()
    for one, other in zip(tensors(by_engine), tensors(by_hand), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.stack([engine.losses[name] for name in engine.problems]), loop.losses)


def test_it_reads_nothing_on_the_host_and_launches_no_more_than_the_engine() -> None:
    with META:
        made = task()
    with pretended_gpu():
        by_hand = count_step(HandRound(made).step)
    by_engine = count_round(lambda: make_student("small", 3, 10, 8), **SMALL)
    assert by_hand.launches <= by_engine.launches
    assert by_hand.flop == by_engine.flop
