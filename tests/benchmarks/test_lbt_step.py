"""The step of LBT by hand, each product by itself, and in one sweep: the same gradients, the passes claimed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mlo
from benchmarks import lbt_step
from benchmarks.lbt_by_hand import ByProducts

EXACT = {"kind": "one_step", "product": "exact"}


def student() -> nn.Module:
    """Without batch norm, so that it is the same whether labeled and unlabeled images go through it together or not."""
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 10)]
    return nn.Sequential(*layers)


def task(**options) -> lbt_step.Task:
    return lbt_step.make_task(student, **{"channels": 2, "cells": 3, "batch": 4, "size": 8} | options)


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def in_motion(optimizers: list[torch.optim.Optimizer]) -> None:
    """Give SGD momentum, as after some steps."""
    for optimizer in optimizers[:2]:
        for parameter in optimizer.param_groups[0]["params"]:
            buffer = torch.arange(parameter.numel()).cos().view_as(parameter)
            optimizer.state[parameter]["momentum_buffer"] = 0.1 * buffer.to(parameter.dtype)


def in_one_sweep(of: lbt_step.Task, left_out: str, moving: bool, estimator: object = EXACT) -> torch.Tensor:
    """Without the student it is DARTS; without the teacher's validation loss, the student's part."""
    levels = lbt_step.problems(of, reads={left_out: None} if left_out else {})
    if moving:
        in_motion([level.optimizer for level in levels])
    if left_out == "student":
        levels.pop(1)
    return flat(mlo.Engine(levels, estimator, device="cpu").hypergradient("arch").values())


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("moving", [False, True], ids=["at rest", "with momentum"])
def test_both_parts_of_the_gradient_are_those_of_one_sweep(moving: bool) -> None:
    """Against exact products, at a radius small enough to miss the kinks of so small a network."""
    by_hand = ByProducts(task(), radius=1e-6)
    if moving:
        in_motion(by_hand.optimizers)
    assert error(flat(by_hand.teacher_part()), in_one_sweep(task(), "student", moving)) < 1e-8
    assert error(flat(by_hand.student_part()), in_one_sweep(task(), "teacher", moving)) < 5e-3


@pytest.mark.usefixtures("float64")
def test_the_teachers_difference_is_the_engines_at_the_papers_radius() -> None:
    """Not so the student's: a difference along a sum of vectors is not the sum of differences."""
    assert error(flat(ByProducts(task()).teacher_part()), in_one_sweep(task(), "student", False, "darts")) < 1e-9


@pytest.mark.usefixtures("float64")
def test_steps_lead_to_the_same_weights() -> None:
    by_hand, indirect = task(), task()
    loop = ByProducts(by_hand, radius=1e-6)
    engine = mlo.Engine(lbt_step.problems(indirect), EXACT, lookahead=True, device="cpu")
    begun = flat(task().architecture.parameters())
    for _ in range(2):
        loop.step()
        engine.step()
    assert error(flat(by_hand.teacher.parameters()), flat(indirect.teacher.parameters())) < 1e-10
    assert error(flat(by_hand.student.parameters()), flat(indirect.student.parameters())) < 1e-10
    ours, theirs = (flat(of.architecture.parameters()) - begun for of in (by_hand, indirect))
    assert error(ours, theirs) < 1e-5


def test_passes_are_those_that_are_claimed() -> None:
    by_hand, indirect = task(), task()
    engine = mlo.Engine(lbt_step.problems(indirect), "darts", device="cpu")
    assert lbt_step.Passes(by_hand).of(ByProducts(by_hand).step) == {
        "teacher": 12 + 2, "teacher images": 4 * 14, "student": 5 + 2, "student images": 4 * 7,
    }  # fmt: skip
    found = lbt_step.Passes(indirect).of(engine.step)
    assert found == {"teacher": 7, "teacher images": 4 * 7, "student": 5, "student images": 4 * 9}
    assert found["teacher"] == engine.passes["teacher"].total()
    assert found["student"] == engine.passes["student"].total()


def test_the_table_sets_them_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_every_exact_product_goes_through_the_supernet() -> None:
    """Forward over reverse too, which its own convolutions have no rule for."""
    found = in_one_sweep(task(), "", True, {"kind": "one_step", "product": "forward"})
    assert error(found, in_one_sweep(task(), "", True)) < 1e-10


def test_the_student_is_the_usual_resnet() -> None:
    with torch.device("meta"):
        network = lbt_step.resnet18()
        assert sum(p.numel() for p in network.parameters()) == 11_173_962
        assert network(torch.empty(2, 3, 32, 32)).shape == (2, 10)
