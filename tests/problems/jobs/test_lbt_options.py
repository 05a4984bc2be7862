"""Every option of the main job reaches the problems that it is about."""

from __future__ import annotations

import json

import pytest
import torch

from mlo import ConfigError
from mlo.runs.run import Run
from problems.data.images import Part
from problems.data.options import Data
from problems.evaluation.options import FinalTraining
from problems.evaluation.training import judge
from problems.jobs.lbt import LbtJob
from problems.jobs.lbt_stages import draw_engine, judge_draw, student_part
from problems.nas import DARTS, PUBLISHED, EvaluationNetwork, Genotype, Supernet, random_genotype
from problems.search.options import Search

DATA = Data(train_size=40, validation_size=50, unlabeled_size=60)
SPLITS = Data(train_size=40, validation_size=50, unlabeled_size=60).splits(seed=0)


def job(**options: object) -> LbtJob:
    small = {"data": DATA, "search": Search(channels=1, cells=3, batch_size=10), "device": "cpu"}
    return LbtJob(**{**small, **options})


def among(images: torch.Tensor, part: Part) -> bool:
    """Whether all these images are of that part."""
    known = part.load().images
    return all((known == image).flatten(1).all(1).any() for image in images)


def test_a_method_given_twice_is_an_error():
    with pytest.raises(ConfigError, match=r"^LbtJob: methods: lbt is given twice; write each method once$"):
        job(methods=["lbt", "plain", "lbt"])


def test_each_level_gets_the_images_meant_for_it():
    levels = job().search_engine("lbt").problems
    assert list(levels) == ["teacher", "student", "arch"]
    for _ in range(4):
        assert among(levels["teacher"].stream.next()[0], SPLITS.train)
        batch = levels["student"].stream.next()
        assert among(batch["labeled"][0], SPLITS.train)
        assert among(batch["unlabeled"][0], SPLITS.unlabeled)
        assert among(levels["arch"].stream.next()[0], SPLITS.validation)
    assert len(batch["labeled"][0]) == len(batch["unlabeled"][0]) == 10


def test_rounds_with_nan_are_skipped_if_that_is_wanted():
    engine = job(search=Search(channels=1, cells=3, batch_size=10, non_finite="skip")).search_engine("lbt")
    weight = next(iter(engine.problems["teacher"].variables.values()))
    engine.problems["teacher"].stream.peek()[0].fill_(float("nan"))
    before = weight.detach().clone()
    engine.step()
    assert torch.equal(weight, before)
    assert engine.metrics()["skipped_rounds"] == 1
    engine.step()
    assert not torch.equal(weight, before)
    assert engine.metrics()["skipped_rounds"] == 1


def test_darts_is_the_same_without_a_student():
    levels = job().search_engine("plain").problems
    assert list(levels) == ["teacher", "arch"]
    assert levels["arch"].node.reads == ("teacher",)
    assert among(levels["teacher"].stream.next()[0], SPLITS.train)
    assert among(levels["arch"].stream.next()[0], SPLITS.validation)


def test_both_networks_are_trained_as_the_options_say():
    found = job(steps=7, search=Search(channels=1, cells=3, batch_size=10, learning_rate=0.3)).search_engine("lbt")
    for name in ("teacher", "student"):
        problem = found.problems[name]
        group = problem.optimizer.param_groups[0]
        assert (group["lr"], group["momentum"], group["weight_decay"], problem.clip_norm) == (0.3, 0.9, 3e-4, 5.0)
        assert (problem.scheduler.T_max, problem.scheduler.eta_min) == (7, 0.001)
    group = found.problems["arch"].optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.5, 0.999), 1e-3, 0.01)
    assert isinstance(found.problems["arch"].optimizer, torch.optim.Adam)


def test_the_supernet_has_the_size_asked_for():
    search = Search(channels=3, cells=4, batch_size=10)
    teacher = job(search=search).search_engine("lbt").problems["teacher"].module
    expected = Supernet(channels=3, cells=4, image_channels=1)
    assert sum(p.numel() for p in teacher.parameters()) == sum(p.numel() for p in expected.parameters())


@pytest.mark.parametrize(
    ("options", "read", "value"),
    [
        ({"pseudo_weight": 0.3}, lambda e: e.problems["student"].pseudo_weight, 0.3),
        ({"student_weight": 0.7}, lambda e: e.problems["arch"].student_weight, 0.7),
        ({"judged_by": "student"}, lambda e: e.problems["arch"].node.reads, ("student",)),
        ({}, lambda e: e.problems["arch"].node.reads, ("teacher", "student")),
        ({"student_learns_from": "pseudo_labels"}, lambda e: set(e.problems["student"].stream.peek()), {"unlabeled"}),
        ({"pseudo_label_path": "paper"}, lambda e: e.problems["student"].node.held, ("arch",)),
        ({}, lambda e: e.problems["student"].node.held, ()),
        ({"lookahead": False}, lambda e: e.report().lookahead, False),
        ({}, lambda e: e.report().lookahead, True),
        (
            {"hypergradient": "cg"},
            lambda e: type(e.report().problems["teacher"].estimator).__name__,
            "ConjugateGradient",
        ),
        ({"hypergradient": "cg", "lookahead": True}, lambda e: e.report().lookahead, True),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_options(options, read, value):
    assert read(job(**options).search_engine("lbt")) == value


def test_the_final_training_is_on_train_and_validation_images_and_never_on_the_test():
    options = FinalTraining(steps=9, channels=2, cells=2, batch_size=90, learning_rate=0.2, drop_path=0.1)
    engine = job(evaluation=options).training_engine(PUBLISHED["DARTS_V2"])
    problem = engine.problems["network"]
    images, labels = problem.stream.next()
    assert len(labels) == 90
    assert among(images, SPLITS.labeled)
    assert len({image.numpy().tobytes() for image in images}) == 90
    group = problem.optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"], problem.clip_norm) == (0.2, 0.9, 3e-4, 5.0)
    assert (problem.total_steps, problem.drop_path, problem.scheduler.T_max) == (9, 0.1, 9)
    expected = EvaluationNetwork(PUBLISHED["DARTS_V2"], 2, 2, image_channels=1)
    assert sum(p.numel() for p in problem.module.parameters()) == sum(p.numel() for p in expected.parameters())


def test_a_network_is_judged_on_the_test_images():
    engine = job(evaluation=FinalTraining(channels=2, cells=1)).training_engine(PUBLISHED["DARTS_V2"])
    network = engine.problems["network"].module.eval()
    test = SPLITS.test.load()
    wrong = network(test.images).logits.argmax(1) != test.labels
    result = judge(engine, job().splits)
    assert result["test_error"] == pytest.approx(100 * wrong.float().mean().item(), abs=1e-4)
    assert result["parameters"] == sum(p.numel() for p in network.parameters())
    assert result["test_images"] == len(test.labels)


def test_random_draws_are_judged_on_the_validation_images_and_trained_on_the_others(tmp_path):
    chooses = job(
        methods=("best_of_random",), draws=3, evaluation=FinalTraining(steps=3, channels=2, cells=1), page=False
    )
    engine = draw_engine(chooses, PUBLISHED["DARTS_V2"])
    assert among(engine.problems["network"].stream.next()[0], SPLITS.train)
    network = engine.problems["network"].module.eval()
    validation = SPLITS.validation.load()
    wrong = network(validation.images).logits.argmax(1) != validation.labels
    assert judge_draw(chooses, engine) == pytest.approx(100 * wrong.float().mean().item(), abs=1e-4)
    run = Run.create("lbt", chooses, tmp_path / "run")
    run.execute()
    judged = [json.loads((run.path / f"stages/draw-{n}/result.json").read_text()) for n in (1, 2, 3)]
    drawn = torch.Generator().manual_seed(0)
    genotypes = [random_genotype(DARTS, drawn) for _ in range(3)]
    assert Genotype.load(run.path / "genotype.json") == genotypes[judged.index(min(judged))]


def test_the_students_part_is_what_gamma_adds():
    few = ("skip_connect", "avg_pool_3x3", "sep_conv_3x3")  # which take less time than all
    search = Search(channels=1, cells=3, batch_size=10, operations=few)
    engine = job(hypergradient="one_step", steps=5, search=search).search_engine("lbt")
    engine.run(4)
    groups = [engine.problems[name].optimizer.param_groups[0] for name in ("teacher", "student")]
    decayed = groups[0]["lr"]
    assert decayed < 0.03
    parts = []
    for weight in (0.0, 1.0, 3.0):
        engine.problems["arch"].student_weight = weight
        for group in groups:
            group["lr"] = 0.05  # what the search began with
        parts.append(torch.cat([g.flatten() for g in engine.hypergradient("arch").values()]))
        for group in groups:
            group["lr"] = decayed
        if weight:
            expected = (parts[-1] - parts[0]).norm() / parts[0].norm()
            assert student_part(engine) == pytest.approx(expected.item(), rel=1e-4)
            assert engine.problems["arch"].student_weight == weight
            assert [group["lr"] for group in groups] == [decayed, decayed]
    assert (parts[2] - parts[0]).norm() == pytest.approx(3 * (parts[1] - parts[0]).norm().item(), rel=1e-3)


def test_the_reported_weights_are_means_of_the_softmax():
    arch = job().search_engine("plain").problems["arch"]
    with torch.no_grad():
        arch.module.normal[:, 3] = 2.0
    found = arch.metrics()
    expected = arch.module.normal.softmax(dim=1).mean(dim=0)
    assert found["normal/skip_connect"] == pytest.approx(expected[3].item())
    assert found["normal/none"] == pytest.approx(expected[0].item())
    assert found["reduce/skip_connect"] == pytest.approx(arch.module.reduce.softmax(1).mean(0)[3].item())
