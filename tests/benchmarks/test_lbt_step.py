"""A step of LBT by hand and by the engine: the same gradients, and the numbers of passes that the docs state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mlo
from benchmarks import lbt_step
from benchmarks.lbt_by_hand import LbtByHand

EXACT = {"kind": "one_step", "product": "exact"}


def student() -> nn.Module:
    """Without batch norm, labeled and unlabeled images give the same outputs together and separately."""
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 10)]
    return nn.Sequential(*layers)


def task(**options) -> lbt_step.Task:
    return lbt_step.make_task(student, **{"channels": 2, "cells": 3, "batch": 4, "size": 8} | options)


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def add_momentum(optimizers: list[torch.optim.Optimizer]) -> None:
    """Fill the momentum buffers of both SGD optimizers, as after some steps."""
    for optimizer in optimizers[:2]:
        for parameter in optimizer.param_groups[0]["params"]:
            buffer = torch.arange(parameter.numel()).cos().view_as(parameter)
            optimizer.state[parameter]["momentum_buffer"] = 0.1 * buffer.to(parameter.dtype)


def engine_gradient(of: lbt_step.Task, left_out: str, moving: bool, estimator: object = EXACT) -> torch.Tensor:
    """The engine's hypergradient: DARTS without the student; the student's part without the teacher's term."""
    levels = lbt_step.problems(of, reads={left_out: None} if left_out else {})
    if moving:
        add_momentum([level.optimizer for level in levels])
    if left_out == "student":
        levels.pop(1)
    return flat(mlo.Engine(levels, estimator, device="cpu").hypergradient("arch").values())


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("moving", [False, True], ids=["at rest", "with momentum"])
def test_both_parts_of_the_gradient_equal_those_of_the_engine(moving: bool) -> None:
    """Against exact products, with a radius so small that the differences cross no kinks."""
    by_hand = LbtByHand(task(), radius=1e-6)
    if moving:
        add_momentum(by_hand.optimizers)
    assert error(flat(by_hand.teacher_part()), engine_gradient(task(), "student", moving)) < 1e-8
    assert error(flat(by_hand.student_part()), engine_gradient(task(), "teacher", moving)) < 5e-3


@pytest.mark.usefixtures("float64")
def test_the_teachers_part_equals_the_engines_at_the_papers_radius() -> None:
    """The student's part does not: a finite difference along a sum of vectors is not the sum of the differences."""
    assert error(flat(LbtByHand(task()).teacher_part()), engine_gradient(task(), "student", False, "darts")) < 1e-9


@pytest.mark.usefixtures("float64")
def test_steps_lead_to_the_same_weights() -> None:
    by_hand, by_engine = task(), task()
    loop = LbtByHand(by_hand, radius=1e-6)
    engine = mlo.Engine(lbt_step.problems(by_engine), EXACT, lookahead=True, device="cpu")
    initial = flat(task().architecture.parameters())
    for _ in range(2):
        loop.step()
        engine.step()
    assert error(flat(by_hand.teacher.parameters()), flat(by_engine.teacher.parameters())) < 1e-10
    assert error(flat(by_hand.student.parameters()), flat(by_engine.student.parameters())) < 1e-10
    ours, theirs = (flat(of.architecture.parameters()) - initial for of in (by_hand, by_engine))
    assert error(ours, theirs) < 1e-5


def test_the_numbers_of_passes_are_those_in_the_docs() -> None:
    by_hand, by_engine = task(), task()
    engine = mlo.Engine(lbt_step.problems(by_engine), "darts", device="cpu")
    assert lbt_step.Passes(by_hand).of(LbtByHand(by_hand).step) == {
        "teacher": 12 + 2, "teacher images": 4 * 14, "student": 5 + 2, "student images": 4 * 7,
    }  # fmt: skip
    found = lbt_step.Passes(by_engine).of(engine.step)
    assert found == {"teacher": 7, "teacher images": 4 * 7, "student": 5, "student images": 4 * 9}
    assert 2 * found["teacher"] == engine.passes["teacher"].total()
    assert 2 * found["student"] == engine.passes["student"].total()


def test_the_table_shows_passes_and_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lbt_step, "cpu_seconds", lambda steps, rounds: [4.0, 1.0, 2.0, 6.0])
    small = {"student": student, "channels": 2, "cells": 3, "batch": 4, "size": 8}
    assert lbt_step.table(1, {"edge by edge": small | {"edge_by_edge": True}, "ours": small}).splitlines()[2:] == [
        "| passes of the teacher | 14 | 7 | 6 | 5 |",
        "| images in them | 56 | 28 | 24 | 20 |",
        "| passes of the student | 7 | 5 | 4 | 3 |",
        "| images in them | 28 | 36 | 28 | 20 |",
        "| CPU time, edge by edge | 4.00 s | 1.00 s: 0.25 | 2.00 s: 0.50 | 6.00 s: 1.50 |",
        "| CPU time, ours | 4.00 s | 1.00 s: 0.25 | 2.00 s: 0.50 | 6.00 s: 1.50 |",
    ]


@pytest.mark.usefixtures("float64")
def test_forward_over_reverse_products_work_through_the_supernet() -> None:
    """They need forward-mode differentiation, which the supernet's own CPU convolutions do not implement."""
    found = engine_gradient(task(), "", True, {"kind": "one_step", "product": "forward"})
    assert error(found, engine_gradient(task(), "", True)) < 1e-10


def test_the_student_is_the_usual_resnet() -> None:
    with torch.device("meta"):
        network = lbt_step.resnet18()
        assert sum(p.numel() for p in network.parameters()) == 11_173_962
        assert network(torch.empty(2, 3, 32, 32)).shape == (2, 10)
