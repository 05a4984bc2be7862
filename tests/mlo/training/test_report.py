"""The report on an engine: what it says of each problem, before and after steps."""

from __future__ import annotations

import copy

import pytest
import torch
from analytic import NESTED_WITH_INNER_PATH, Smooth
from brute_force import small_lbt
from engine_state import same, snapshot

import mlo
from mlo.hypergradient import Darts, OneStep, Unrolled


def test_a_report_says_how_each_problem_is_trained():
    engine = mlo.Engine(small_lbt("momentum", steps=3), {"kind": "unrolled", "graph_memory": 1.0}, device="cpu")
    report = engine.report()
    teacher, student, arch = report.problems.values()
    assert (report.device, report.lookahead, report.inner_path, report.compile) == (
        torch.device("cpu"),
        False,
        False,
        False,
    )
    assert (teacher.name, teacher.level, teacher.steps, teacher.recorded) == ("teacher", 1, 3, 3)
    assert teacher.estimator == student.estimator == Unrolled(graph_memory=1.0)
    assert (teacher.through, arch.through) == ((), ("student", "teacher"))
    assert (arch.estimator, arch.recorded, arch.looks_ahead) == (None, 0, False)
    assert (teacher.graph_bytes, teacher.loss_scale, teacher.compiled, teacher.not_compiled) == (None, None, (), {})
    engine.step()
    assert engine.report().problems["teacher"].graph_bytes > 0
    assert report.problems["teacher"].graph_bytes is None, "a report is of its time"


def test_the_problems_own_estimators_and_lookahead_are_reported():
    stack = small_lbt("sgd", steps=2)
    stack[1].hypergradient = "one_step"
    report = mlo.Engine(stack, {"kind": "darts", "radius": 0.02}, device="cpu").report()
    assert [problem.looks_ahead for problem in report.problems.values()] == [False, False, True]
    assert report.problems["teacher"].estimator == Darts(radius=0.02)
    assert report.problems["student"].estimator == OneStep()
    assert report.problems["student"].recorded == 1, "one step differentiates the last alone"


def test_first_order_goes_through_nothing():
    stack = small_lbt("sgd")
    stack[0].hypergradient = "first_order"
    problems = mlo.Engine(stack, "one_step", device="cpu").report().problems
    assert problems["arch"].through == ("student",)
    assert problems["teacher"].estimator is None


@pytest.mark.usefixtures("float64")
def test_the_inner_path_is_reported():
    stack = Smooth.make(NESTED_WITH_INNER_PATH, settled=False).problems(steps=2)
    report = mlo.Engine(stack, "unrolled", inner_path=True, device="cpu").report()
    assert report.inner_path
    assert any(problem.inner for problem in report.problems.values())


def test_a_printed_report_is_read_from_the_top_level_down():
    stack = small_lbt("sgd", steps=2)
    stack[0].hypergradient = "one_step"
    lines = str(mlo.Engine(stack, "darts", device="cpu").report()).splitlines()
    assert lines == [
        "device='cpu', lookahead=True, inner_path=False, compile=False, capture=False, tf32=None",
        "level 3  arch: 1 step a round",
        "    hypergradient through student, teacher, after virtual steps of the problems below",
        "level 2  student: 2 steps a round",
        "    differentiated by Darts(radius=0.01), with 1 recorded step a round",
        "level 1  teacher: 2 steps a round",
        "    differentiated by OneStep(product=Exact(autocast=False)), with 1 recorded step a round",
    ]


def test_a_report_changes_nothing():
    stack = small_lbt("sgd")
    engine = mlo.Engine(stack, "darts", device="cpu")
    engine.step()
    before, passes = snapshot(stack), copy.deepcopy(engine.passes)
    str(engine.report())
    assert same(snapshot(stack), before)
    assert engine.passes == passes
