"""Options for speed: each reaches the engine, and what is trained under it learns."""

from __future__ import annotations

import needs
import pytest
import torch

from mlo.options.config import parse
from problems.jobs.evaluate import EvaluateJob
from problems.jobs.lbt import LbtJob
from problems.nas import PUBLISHED

DATA = {"train_size": 40, "validation_size": 50, "unlabeled_size": 60}
TYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPERATIONS = ["none", "max_pool_3x3", "sep_conv_3x3", "dil_conv_5x5"]  # one of each kind, to be fast
GENOTYPE = PUBLISHED["DARTS_V2"]


def job(precision: str = "float32", **options: object) -> LbtJob:
    search = {"channels": 1, "cells": 3, "batch_size": 10, "precision": precision, "operations": OPERATIONS}
    evaluation = {"channels": 2, "cells": 1, "batch_size": 10, "precision": precision}
    return parse(LbtJob, {"data": DATA, "device": "cpu", "search": search, "evaluation": evaluation, **options})


def losses_of(engine, rounds: int) -> list[dict[str, float]]:
    found = []
    engine.run(rounds, callbacks=[lambda e: found.append({name: float(loss) for name, loss in e.losses.items()})])
    return found


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("hypergradient", ["darts", "one_step"])
def test_a_search_trains_in_each_precision(precision, hypergradient):
    engine = job(precision, hypergradient=hypergradient).search_engine("lbt")
    assert {problem.autocast for problem in engine.problems.values()} == {TYPES[precision]}
    before = engine.problems["arch"].module.normal.detach().clone()
    (losses,) = losses_of(engine, 1)
    assert losses.keys() == {"teacher", "student", "arch"}
    assert not torch.equal(engine.problems["arch"].module.normal, before)
    assert engine.problems["arch"].module.normal.isfinite().all()


def first_loss(precision: str) -> torch.Tensor:
    torch.manual_seed(0)
    return job(precision).search_engine("lbt").objective("teacher")


def test_a_lower_precision_is_near_the_full_one_and_not_the_same():
    exact = first_loss("float32")
    for precision, near in (("bfloat16", 0.1), ("float16", 0.02)):
        found = first_loss(precision)
        assert found != exact
        assert found.item() == pytest.approx(exact.item(), rel=near)


@pytest.mark.parametrize("precision", TYPES)
def test_a_final_training_trains_in_each_precision(precision):
    alone = parse(
        EvaluateJob,
        {
            "genotype": "DARTS_V2",
            "data": DATA,
            "device": "cpu",
            "training": {"channels": 2, "cells": 1, "precision": precision},
        },
    )
    for engine in (job(precision).training_engine(GENOTYPE), alone.engine()):
        assert engine.problems["network"].autocast is TYPES[precision]
    losses = [found["network"] for found in losses_of(job(precision).training_engine(GENOTYPE), 40)]
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("tf32", [None, True, False])
def test_tf32_reaches_both_engines(tf32):
    made = job()
    made = made.model_copy(
        update={
            "search": made.search.model_copy(update={"tf32": tf32}),
            "evaluation": made.evaluation.model_copy(update={"tf32": tf32}),
        }
    )
    assert [engine.tf32 for engine in (made.search_engine("lbt"), made.training_engine(GENOTYPE))] == [tf32, tf32]


@needs.compiled_gradients
def test_a_compiled_search_takes_the_same_steps(monkeypatch):
    calls = []
    monkeypatch.setattr("torch.compile", lambda run, **options: calls.append(options) or run)  # what is compiled, run
    found = {}
    for compile in (False, True):
        torch.manual_seed(0)
        engine = job(compile=compile, hypergradient="one_step").search_engine("lbt")
        found[compile] = losses_of(engine, 2)
        assert bool(calls) == compile
    for one, other in zip(found[False], found[True], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
