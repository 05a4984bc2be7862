"""The runs of the paper: valid options at both scales, the sizes of the papers, one key for each run."""

from __future__ import annotations

import pytest

from mlo.options.config import defaults, validate
from mlo.options.yaml_options import merge
from problems.jobs.evaluate import EvaluateJob
from problems.jobs.lbt import LbtJob
from problems.paper.figures import Benefit, Figure3, Figure4
from problems.paper.settings import Setting
from problems.paper.tables import Table2, Table3, Table4, Table5, Table6

EXPERIMENTS = [Table2, Table3, Table4, Table5, Table6, Figure3, Figure4, Benefit]
JOBS = {"lbt": LbtJob, "evaluate": EvaluateJob}


def wanted() -> list[tuple[str, str, object]]:
    return [(s, key, w) for e in EXPERIMENTS for s in e.scales for key, w in e().runs(s).items()]


@pytest.mark.parametrize(("scale", "key", "run"), wanted(), ids=str)
def test_every_run_is_valid_and_its_searches_can_be_built(scale, key, run):
    model = JOBS[run.job]
    extra = {"genotype": "DARTS_V2"} if run.uses else {}
    job = validate(model, merge(merge(defaults(model), run.options), extra), key)
    if isinstance(job, LbtJob):
        assert len(job.methods) == 1


def test_equal_keys_mean_equal_runs():
    for scale in ("laptop", "paper"):
        seen: dict[str, object] = {}
        for each in EXPERIMENTS:
            if scale in each.scales:
                for key, run in each().runs(scale).items():
                    assert seen.setdefault(key, run) == run


def paper(*run: object, **changes: object) -> LbtJob:
    return validate(LbtJob, merge(defaults(LbtJob), Setting(*run, **changes).options("paper")), "test")


def test_the_sizes_of_the_paper():
    darts = paper("cifar10", "darts2", "rn18")
    assert (darts.search.channels, darts.search.cells, darts.search.batch_size) == (16, 8, 64)
    assert darts.steps == 50 * (25000 // 64)
    assert (darts.search.learning_rate, darts.search.last_learning_rate) == (0.025, 0.001)
    assert darts.search.architecture_learning_rate == 3e-4
    assert (darts.data.train_size, darts.data.validation_size, darts.data.unlabeled_source) == (
        25000,
        25000,
        "cifar100",
    )
    assert darts.title("lbt") == "LBT(RN18, DARTS-2nd)"
    final = darts.evaluation
    assert (final.channels, final.cells, final.batch_size, final.steps) == (36, 20, 96, 600 * 520)
    assert (final.augmentation.cutout, final.drop_path, final.auxiliary, final.images) == (16, 0.2, True, "everything")


def test_the_sizes_of_the_other_spaces():
    p_darts = paper("cifar100", "pdarts")
    assert p_darts.search.cells == (5, 11, 17)
    assert p_darts.search.skip_dropout == (0.1, 0.2, 0.3)
    assert paper("cifar10", "pdarts").search.skip_dropout == (0.0, 0.4, 0.7)
    assert (p_darts.steps, p_darts.search.warmup) == (25 * 260, 10 * 260)
    assert (p_darts.search.architecture_clip, p_darts.evaluation.batch_size) == (5.0, 128)
    pc_darts = paper("cifar10", "pcdarts")
    assert (pc_darts.search.batch_size, pc_darts.search.learning_rate, pc_darts.search.warmup) == (256, 0.1, 15 * 97)
    imagenet = paper("imagenet", "pcdarts", "rn50")
    assert (imagenet.search.partial, imagenet.search.batch_size, imagenet.search.learning_rate) == (2, 1024, 0.5)
    assert imagenet.search.warmup / imagenet.steps == pytest.approx(35 / 50)
    assert (imagenet.data.train_size, imagenet.data.validation_size) == (128116, 32029)
    assert (imagenet.evaluation.label_smoothing, imagenet.evaluation.weight_decay) == (0.1, 3e-5)


def test_runs_with_and_without_a_student_differ_only_in_method_and_student():
    with_student, without = (Setting("cifar10", "pdarts", student).options("paper") for student in ("rn18", None))
    differing = {name for name in {**with_student, **without} if with_student.get(name) != without.get(name)}
    assert differing <= {"methods", "student", "judged_by", "student_learns_from", "pseudo_weight", "student_weight"}


def test_the_ablations_test_on_5000_held_out_images():
    run = Setting("cifar10", "darts2", "rn18", held_out=True)
    for scale in ("laptop", "paper"):
        assert run.options(scale)["data"]["held_out_size"] == 5000
    assert paper("cifar10", "darts2", "rn18", held_out=True).data.train_size == 22500
