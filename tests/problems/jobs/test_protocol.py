"""What the levels and trainings of the jobs really see and report: images, losses, errors, seeds, stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mlo.options.config import Config, parse
from mlo.runs.run import Run
from problems.data.images import Part
from problems.data.options import Data
from problems.data.sources import LoadOptions, load_source
from problems.evaluation.options import Training
from problems.evaluation.training import judge, training_engine
from problems.jobs.evaluate import EvaluateJob
from problems.jobs.lbt import LbtJob
from problems.nas import PUBLISHED, ArchitectureLogits, Genotype, derive, random_genotype

TINY = {"train_size": 40, "validation_size": 40, "unlabeled_size": 60, "held_out_size": 100, "test_size": 20}
SMALL_SEARCH = {"channels": 1, "cells": 3, "batch_size": 10}
SMALL_TRAINING = {"channels": 1, "cells": 1, "batch_size": 10}
CUTOUT = {"cutout": 4}


def job(kind: type[Config], **options: Any) -> Any:
    return parse(kind, {"data": TINY, "device": "cpu", **options})


def training(where: str, **options: Any) -> tuple[Any, Any]:
    """The final training of `lbt` or the one of `evaluate`, and the job's splits."""
    given = {**SMALL_TRAINING, **options}
    if where == "lbt":
        built = job(LbtJob, evaluation={"steps": 2, **given}, search=SMALL_SEARCH)
        engine = built.training_engine(PUBLISHED["DARTS_V2"])
    else:
        built = job(EvaluateJob, genotype="DARTS_V2", training=given, steps=2)
        engine = built.engine()
    return engine.problems["network"], built.data.splits(built.seed)


def seen(problem: Any) -> Any:
    """The next batch that a level gets."""
    return problem.stream.peek()


def stored(images: torch.Tensor, part: Part) -> torch.Tensor:
    """Which images are, to the last bit, images of the part."""
    whole = part.load().images.flatten(1)
    return (images.flatten(1)[:, None] == whole[None]).all(dim=2).any(dim=1)


@pytest.mark.parametrize("where", ["lbt", "evaluate"])
def test_the_images_of_the_final_training_are_augmented(where):
    problem, splits = training(where, augmentation=CUTOUT)
    assert not stored(seen(problem)[0], splits.labeled).any()
    problem, splits = training(where)
    assert stored(seen(problem)[0], splits.labeled).all()


@pytest.mark.parametrize("variant", ["paper", "authors"])
def test_all_images_of_a_search_are_augmented(variant):
    for augmentation, is_stored in ((CUTOUT, False), ({}, True)):
        built = job(LbtJob, search={**SMALL_SEARCH, "augmentation": augmentation}, variant=variant)
        levels, splits = built.search_engine("lbt").problems, built.data.splits(built.seed)
        of_student = seen(levels["student"])
        for (images, _), part in (
            (seen(levels["teacher"]), splits.train),
            (of_student["labeled"], splits.train),
            (of_student["unlabeled"], splits.unlabeled),
            (seen(levels["arch"]), splits.validation),
        ):
            assert stored(images, part).tolist() == [is_stored] * 10


@pytest.mark.parametrize("where", ["lbt", "evaluate"])
@pytest.mark.parametrize("images", ["labeled", "everything"])
def test_the_final_training_has_the_images_that_it_was_given(where, images):
    problem, splits = training(where, images=images, batch_size=1797)
    batch, labels = seen(problem)  # all of them, for a batch is never larger than its part
    expected = getattr(splits, images)
    assert len(expected) == {"labeled": 80, "everything": 1697}[images]
    assert len(batch) == len(expected)
    assert torch.equal(labels.bincount(), expected.labels.bincount())
    assert torch.equal(batch.flatten(1).unique(dim=0), expected.load().images.flatten(1).unique(dim=0))
    assert not stored(batch, splits.test).any()


def npz(path: Path, classes: int, side: int = 8) -> str:
    draw, count = np.random.default_rng(0), 5 * classes
    arrays = {f"{p}_images": draw.integers(0, 256, (count, side, side, 3), dtype=np.uint8) for p in ("train", "test")}
    np.savez(path, **arrays, **{f"{p}_labels": np.arange(count) % classes for p in ("train", "test")})
    return str(path)


@pytest.mark.parametrize(("classes", "reported"), [(10, False), (12, True)])
def test_the_top_5_error_is_reported_for_more_than_10_classes(tmp_path, classes, reported):
    sizes = dict.fromkeys(("train_size", "validation_size", "unlabeled_size"), classes)
    splits = Data(source=npz(tmp_path / "x.npz", classes), **sizes).splits(seed=0)
    options = Training(**SMALL_TRAINING)
    engine = training_engine(options, PUBLISHED["DARTS_V2"], splits, splits.labeled, 1, "cpu")
    result = judge(engine, splits)
    assert ("test_top5_error" in result) == reported
    if reported:
        assert 0 <= result["test_top5_error"] < result["test_error"]


def test_the_auxiliary_head_has_the_papers_weight(tmp_path):
    sizes = {"train_size": 20, "validation_size": 10, "unlabeled_size": 10}
    splits = Data(source=npz(tmp_path / "x.npz", 10, side=32), **sizes).splits(seed=0)
    options = Training(channels=2, cells=3, batch_size=10, auxiliary=True, label_smoothing=0.1)
    problem = training_engine(options, PUBLISHED["DARTS_V2"], splits, splits.labeled, 2, "cpu").problems["network"]
    batch = seen(problem)
    logits, auxiliary = problem.module(batch[0])
    main, extra = (F.cross_entropy(each, batch[1], label_smoothing=0.1).item() for each in (logits, auxiliary))
    assert problem.loss(batch).item() == pytest.approx(main + 0.4 * extra, rel=1e-4)


def test_imagenet_is_trained_on_train_and_tested_on_val(tmp_path):
    root = tmp_path / "imagenet"
    for part, count, value in (("train", 3, 50), ("val", 2, 200)):
        for name in ("n01440764", "n01443537"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((20, 30, 3), value, np.uint8)).save(root / part / name / f"{i}.png")
    torch.save(({"n01440764": ("tench",), "n01443537": ("goldfish",)}, []), root / "meta.bin")
    labeled, test = load_source("imagenet", LoadOptions(tmp_path, image_size=16))
    assert test is not None
    assert (labeled.labels.tolist(), test.labels.tolist()) == ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1])
    assert (labeled.load().images * 255).round().unique().tolist() == [50]
    assert (test.load().images * 255).round().unique().tolist() == [200]


def executed(path: Path, **options: Any) -> Path:
    """The folder of a whole run of `lbt`, its networks as small as can be."""
    evaluation = {**SMALL_TRAINING, "steps": 1}
    Run.create("lbt", job(LbtJob, page=False, evaluation=evaluation, **options), path).execute()
    return path


def drawn(seed: int, count: int, **options: Any) -> list[Genotype]:
    generator = torch.Generator().manual_seed(seed)
    return [random_genotype(job(LbtJob, **options).search.first_space, generator) for _ in range(count)]


def test_a_random_architecture_is_drawn_by_the_jobs_seed(tmp_path):
    options = {"methods": ["random", "best_of_random"], "draws": 2, "search": SMALL_SEARCH}
    found = []
    for seed in (1, 2):
        path = executed(tmp_path / str(seed), seed=seed, **options)
        first, second = drawn(seed, 2)
        found.append(Genotype.load(path / "genotype.json"))
        assert found[-1] == first
        assert Genotype.load(path / "genotype-best_of_random.json") in (first, second)
    assert found[0] != found[1]


def test_p_darts_narrows_from_stage_to_stage_and_derives_from_the_last(tmp_path, monkeypatch):
    searched, build = [], LbtJob.search_engine

    def watched(self, *args, **kwargs):
        engine = build(self, *args, **kwargs)
        searched.append(engine.problems["teacher"].module)
        return engine

    monkeypatch.setattr(LbtJob, "search_engine", watched)
    search = {**SMALL_SEARCH, "space": "p_darts", "cells": [3, 4, 5], "architecture_learning_rate": 0.1}
    options = {"methods": ["plain"], "steps": 2, "teacher_hypergradient": "first_order", "search": search}
    run = executed(tmp_path / "run", **options)
    stages = [run / "stages" / f"search-plain-{number}" for number in (1, 2, 3)]
    results = [json.loads((stage / "result.json").read_text()) for stage in stages]
    assert [len(supernet.cells) for supernet in searched] == [3, 4, 5]
    genotype, space = Genotype.load(run / "genotype.json"), searched[-1].space
    for kind in ("normal", "reduce"):
        left = [set(space.operations)] * 14
        for supernet, result, keep in zip(searched, results, (5, 3, None), strict=True):
            assert [set(names) for names in supernet.space.choices(kind)] == left
            rows = [dict(zip(space.operations, row, strict=True)) for row in result[kind]]
            if keep is not None:  # those of largest logits, of those that were there
                left = [set(sorted(o, key=row.__getitem__)[-keep:]) for o, row in zip(left, rows, strict=True)]
        for node, choices in enumerate(genotype.cell(kind)):
            for choice in choices:
                assert choice.operation in left[space.edges.index((choice.source, node))]
    logits = ArchitectureLogits(*(torch.tensor(results[-1][kind]) for kind in ("normal", "reduce")))
    assert genotype == derive(space, logits)
    assert genotype != derive(searched[0].space, logits), "the first space would have given another"
