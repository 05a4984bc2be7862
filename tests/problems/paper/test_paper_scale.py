"""The paper's networks, students and training options in full size, on a few images and for one step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mlo.options.config import defaults, validate
from mlo.options.yaml_options import merge
from problems.jobs.evaluate import EvaluateJob
from problems.jobs.lbt import LbtJob
from problems.nas import PUBLISHED
from problems.paper.settings import Setting
from problems.paper.tables import transfer_options


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    draw = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("data")
    for name in ("one", "other"):
        arrays = {f"{p}_images": draw.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8) for p in ("train", "test")}
        np.savez(folder / f"{name}.npz", **arrays, **{f"{p}_labels": np.arange(60) % 10 for p in ("train", "test")})
    sources = {"source": str(folder / "one.npz"), "unlabeled_source": str(folder / "other.npz")}
    return {**sources, "train_size": 30, "validation_size": 30}


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    draw = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("folders")
    for part in ("train", "val"):
        for kind in ("cat", "dog"):
            (root / part / kind).mkdir(parents=True)
            for number in range(8):
                pixels = draw.integers(0, 256, (240, 260, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / kind / f"{number}.jpg")
    sizes = {"train_size": 6, "validation_size": 4, "unlabeled_size": 4}
    return {"source": str(root), "image_size": 224, "workers": 0, **sizes}


def paper(run: Setting, data: dict[str, object], batch: int) -> LbtJob:
    few = {"data": data, "search": {"batch_size": batch}, "evaluation": {"batch_size": batch}, "device": "cpu"}
    return validate(LbtJob, merge(merge(defaults(LbtJob), run.options("paper")), few), run.key)


@pytest.mark.parametrize(
    ("space", "student", "cells", "weights"),
    [
        ("darts2", "rn18", 8, 1_930_618),
        ("darts1", None, 8, 1_930_618),
        ("pcdarts", "rn50", 8, 299_578),
        ("pdarts", "rn18", 5, 1_275_834),
    ],
)
def test_a_search_on_cifar(cifar, space, student, cells, weights):
    job = paper(Setting("cifar10", space, student), cifar, batch=2)
    engine = job.search_engine("lbt" if student else "plain")
    teacher = engine.problems["teacher"].module
    assert len(teacher.cells) == cells
    assert sum(p.numel() for p in teacher.parameters()) == weights
    if student:
        size = sum(p.numel() for p in engine.problems["student"].module.parameters())
        assert size == {"rn18": 11_173_962, "rn50": 23_520_842}[student]
    engine.rounds = job.search.warmup  # past it, so that the architecture steps too
    before = engine.problems["arch"].module.normal.detach().clone()
    engine.run(1)
    assert not torch.equal(before, engine.problems["arch"].module.normal)


def test_an_evaluation_on_cifar(cifar):
    job = paper(Setting("cifar10", "darts2"), cifar, batch=2)
    engine = job.training_engine(PUBLISHED["DARTS_V2"])
    network = engine.problems["network"].module
    assert sum(p.numel() for p in network.parameters()) == 3_349_342 + 476_426
    engine.run(1)
    assert engine.losses["network"].isfinite()


def test_a_search_on_imagenet_and_an_evaluation_of_a_cifar_architecture(imagenet):
    job = paper(Setting("imagenet", "pcdarts"), imagenet, batch=2)
    engine = job.search_engine("plain")
    engine.run(1)
    assert engine.losses["teacher"].isfinite()
    options = merge(
        transfer_options(Setting("imagenet", "pdarts"), "paper"), {"data": imagenet, "training": {"batch_size": 2}}
    )
    evaluate = validate(EvaluateJob, merge(merge(defaults(EvaluateJob), options), {"genotype": "PDARTS"}), "test")
    trained = evaluate.engine()
    trained.run(1)
    assert trained.losses["network"].isfinite()
    assert (len(trained.problems["network"].module.cells), evaluate.training.label_smoothing) == (14, 0.1)
