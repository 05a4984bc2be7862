"""The hyperparameters of the paper-scale runs equal those of the papers that introduced the search spaces."""

from __future__ import annotations

from typing import Any

import pytest

from mlo.options.config import defaults, validate
from mlo.options.yaml_options import merge
from problems.jobs.evaluate import EvaluateJob
from problems.jobs.lbt import LbtJob
from problems.paper.settings import PAPER_SPACES, Setting, benefit_options
from problems.paper.tables import transfer_options

CROP_AND_FLIP = {"crop": 4, "flip": True, "cutout": 0, "resized_crop": False, "jitter": 0.0}
OF_IMAGENET = {"crop": 0, "flip": True, "cutout": 0, "resized_crop": True, "jitter": 1.0}
P_DARTS_CELLS = (5, 11, 17)

# channels, cells, batch, first and last rate, architecture's rate, epochs, warm-up epochs, first order?, dropout
SEARCHES = {
    ("cifar10", "darts1"): (16, 8, 64, 0.025, 0.001, 3e-4, 50, 0, True, 0.0),
    ("cifar10", "darts2"): (16, 8, 64, 0.025, 0.001, 3e-4, 50, 0, False, 0.0),
    ("cifar10", "pdarts"): (16, P_DARTS_CELLS, 96, 0.025, 0.0, 6e-4, 25, 10, True, (0.0, 0.4, 0.7)),
    ("cifar10", "pcdarts"): (16, 8, 256, 0.1, 0.0, 6e-4, 50, 15, True, 0.0),
    ("cifar100", "darts1"): (16, 8, 64, 0.025, 0.001, 3e-4, 50, 0, True, 0.0),
    ("cifar100", "darts2"): (16, 8, 64, 0.025, 0.001, 3e-4, 50, 0, False, 0.0),
    ("cifar100", "pdarts"): (16, P_DARTS_CELLS, 96, 0.025, 0.0, 6e-4, 25, 10, True, (0.1, 0.2, 0.3)),
    ("cifar100", "pcdarts"): (16, 8, 256, 0.1, 0.0, 6e-4, 50, 15, True, 0.0),
    ("imagenet", "pcdarts"): (16, 8, 1024, 0.5, 0.0, 6e-3, 50, 35, True, 0.0),
}
TRAIN_IMAGES = {"cifar10": 25_000, "cifar100": 25_000, "imagenet": 128_116}

# space: batch and last drop-path of the final training on CIFAR
FINALS = {"darts1": (96, 0.2), "darts2": (96, 0.2), "pdarts": (128, 0.3), "pcdarts": (96, 0.3)}
# space: batch, rate and schedule of the final training on ImageNet
IMAGENET_FINALS = {
    "darts1": (128, 0.1, "exponential"),
    "darts2": (128, 0.1, "exponential"),
    "pdarts": (1024, 0.5, "linear"),
    "pcdarts": (1024, 0.5, "linear"),
}


def paper(data: Any, space: str, student: str | None = None, **changes: Any) -> LbtJob:
    options = Setting(data, space, student, **changes).options("paper")
    return validate(LbtJob, merge(defaults(LbtJob), options), "test")


@pytest.mark.parametrize("student", [None, "rn18", "rn50"])
@pytest.mark.parametrize(("data", "space"), SEARCHES)
def test_a_search(data, space, student):
    job = paper(data, space, student)
    search, epoch = job.search, TRAIN_IMAGES[data] // job.search.batch_size
    first_order = job.teacher_hypergradient is not None and not job.teacher_hypergradient.differentiates
    found = (
        *(search.channels, search.cells, search.batch_size, search.learning_rate, search.last_learning_rate),
        *(search.architecture_learning_rate, job.steps / epoch, search.warmup / epoch, first_order),
        search.skip_dropout,
    )
    assert found == SEARCHES[data, space]
    assert ("teacher_hypergradient" in Setting(data, space, student).options("paper")) == first_order
    assert job.hypergradient == LbtJob().hypergradient
    assert search.architecture_clip == (5.0 if space == "pdarts" else None)
    assert search.augmentation.model_dump() == (OF_IMAGENET if data == "imagenet" else CROP_AND_FLIP)
    assert search.space == {"pdarts": "p_darts", "pcdarts": "pc_darts"}.get(space, "darts")
    assert search.first_space.partial == (1 if space != "pcdarts" else 2 if data == "imagenet" else 4)
    assert [search.stages, search.operations, search.drops] == [3 if space == "pdarts" else 1, None, None]
    assert (job.student, job.methods) == {
        None: ("small", ("plain",)),
        "rn18": ("resnet18", ("lbt",)),
        "rn50": ("resnet50", ("lbt",)),
    }[student]


@pytest.mark.parametrize("scale", ["laptop", "paper"])
@pytest.mark.parametrize("space", PAPER_SPACES)
def test_first_order_methods_are_first_order_at_every_scale(scale, space):
    options = Setting("cifar10", space).options(scale)
    assert options.get("teacher_hypergradient") == (None if space == "darts2" else "first_order")


def test_the_student_trains_with_the_hyperparameters_of_the_search():
    engine = validate(
        LbtJob, {"search": {"channels": 1, "cells": 3, "learning_rate": 0.025}, "device": "cpu"}, "test"
    ).search_engine("lbt")
    for level in ("teacher", "student"):
        group = engine.problems[level].optimizer.param_groups[0]
        assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.025, 0.9, 3e-4)
        assert engine.problems[level].clip_norm == 5.0
    group = engine.problems["arch"].optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.999), 1e-3)


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
@pytest.mark.parametrize("space", FINALS)
def test_a_final_training_on_cifar(data, space):
    final = paper(data, space, "rn18").evaluation
    assert (final.batch_size, final.drop_path) == FINALS[space]
    assert (final.channels, final.cells, final.learning_rate, final.schedule) == (36, 20, 0.025, "cosine")
    assert final.steps / (50_000 // final.batch_size) == 600
    assert (final.weight_decay, final.label_smoothing, final.auxiliary) == (3e-4, 0.0, True)
    assert final.images == "everything"
    assert final.augmentation.model_dump() == {**CROP_AND_FLIP, "cutout": 16}


@pytest.mark.parametrize("space", IMAGENET_FINALS)
def test_a_final_training_on_imagenet(space):
    options = merge(transfer_options(Setting("imagenet", space, "rn50"), "paper"), {"genotype": "DARTS_V2"})
    job = validate(EvaluateJob, merge(defaults(EvaluateJob), options), "test")
    training = job.training
    assert (training.batch_size, training.learning_rate, training.schedule) == IMAGENET_FINALS[space]
    assert job.steps / (1_281_167 // training.batch_size) == 250
    assert (training.channels, training.cells) == (48, 14)
    assert (training.weight_decay, training.label_smoothing, training.drop_path) == (3e-5, 0.1, 0.0)
    assert (training.auxiliary, training.images) == (True, "everything")
    assert training.augmentation.model_dump() == OF_IMAGENET
    if space == "pcdarts":  # the search on ImageNet trains its result in the same job, with the same options
        own = paper("imagenet", "pcdarts", "rn50").evaluation
        assert own.model_dump() == {**training.model_dump(), "steps": job.steps}


@pytest.mark.parametrize("scale", ["laptop", "paper"])
@pytest.mark.parametrize("space", IMAGENET_FINALS)
def test_a_transfer_is_trained_on_the_data_of_its_run(scale, space):
    run = Setting("imagenet", space, "rn50")
    options = transfer_options(run, scale)
    assert options["data"] == run.options(scale)["data"]
    assert options["data"]["source"] == {"laptop": "cifar10", "paper": "imagenet"}[scale]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (1.0, 1.0, "both", "both")),
        ({"pseudo_weight": 0.1}, (0.1, 1.0, "both", "both")),
        ({"student_weight": 10.0}, (1.0, 10.0, "both", "both")),
        ({"judged_by": "student"}, (1.0, 1.0, "student", "both")),
        ({"student_learns_from": "pseudo_labels"}, (1.0, 1.0, "both", "pseudo_labels")),
    ],
    ids=str,
)
def test_trade_offs_and_ablations_reach_the_job(changes, expected):
    job = paper("cifar10", "darts2", "rn18", **changes)
    assert (job.pseudo_weight, job.student_weight, job.judged_by, job.student_learns_from) == expected


@pytest.mark.parametrize(
    ("method", "student_weight", "judged_by"),
    [("plain", 1.0, "both"), ("lbt", 20.0, "both"), ("lbt", 1.0, "student"), ("random", 1.0, "both")],
)
def test_the_setting_in_which_teaching_should_help(method, student_weight, judged_by):
    options = benefit_options(method, student_weight, judged_by)
    job = validate(LbtJob, merge(defaults(LbtJob), options), "test")
    assert (job.methods, job.student_weight, job.judged_by) == ((method,), student_weight, judged_by)
    assert job.search.operations == ("max_pool_3x3", "skip_connect", "sep_conv_3x3", "noise")
    assert (job.data.train_size, job.data.validation_size, job.data.unlabeled_size) == (100, 100, 8000)
    assert (job.search.augmentation.crop, job.search.augmentation.flip) == (2, True)
    assert job.evaluation.images == "everything"
