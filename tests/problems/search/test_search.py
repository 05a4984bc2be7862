"""The search phase: stages, schedules, and what reaches the levels."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

import pytest
import torch

from mlo.cli.options import read_options
from mlo.options.config import parse
from problems import nas
from problems.jobs.lbt import LbtJob
from problems.nas import Architecture, ArchitectureLogits
from problems.search.levels import skip_dropout_at
from problems.search.options import Search

TINY = {"train_size": 40, "validation_size": 50, "unlabeled_size": 60}


def job(**options: object) -> LbtJob:
    return parse(LbtJob, {"data": TINY, "device": "cpu", **options})


def test_skip_dropout_decays_as_in_p_darts():
    # 25 epochs of 4 steps, frozen for 10: p0 (24 - e)/25, then p0 exp(-0.2 (e - 10))
    def at(epoch: int) -> float:
        return skip_dropout_at(0.4, 4 * epoch + 3, 100, 40)

    assert at(0) == pytest.approx(0.4 * 24 / 25)
    assert at(9) == pytest.approx(0.4 * 15 / 25)
    assert at(10) == pytest.approx(0.4)
    assert at(24) == pytest.approx(0.4 * math.exp(-0.2 * 14))


def test_the_page_on_spaces_names_the_option_of_each():
    page = (Path(__file__).parents[3] / "docs" / "search_spaces.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| `(--search[^`]*)` \|", page, re.MULTILINE))
    assert list(rows) == ["DARTS", "PC_DARTS", "P_DARTS", "ROBUST_S4"]
    for name, words in rows.items():
        assert job(**read_options(LbtJob, shlex.split(words))).search.first_space == getattr(nas, name)


def test_the_teacher_sets_the_dropout_of_its_own_supernet():
    search = {"space": "p_darts", "channels": 1, "cells": 3, "skip_dropout": 0.5, "warmup": 5, "batch_size": 10}
    engine = job(search=search, steps=10).search_engine("plain")
    seen = []
    for _ in range(10):
        engine.step()
        seen.append(engine.problems["teacher"].module.skip_dropout)
    epochs = [25 * n // 10 for n in range(10)]
    expected = [0.5 * (24 - e) / 25 if n < 5 else 0.5 * math.exp(-0.2 * (e - 12)) for n, e in enumerate(epochs)]
    assert seen == pytest.approx(expected)


def test_stages_have_their_own_cells_and_fewer_operations():
    search = Search(space="p_darts", channels=2, cells=(3, 4, 5))
    logits = [Architecture(search.first_space)() for _ in range(2)]
    sizes = [{len(names) for names in search.stage_space(logits[:n]).choices("normal")} for n in range(3)]
    assert sizes == [{8}, {5}, {3}]
    built = job(search={"space": "p_darts", "channels": 2, "cells": [3, 4, 5]})
    for stage in range(3):
        teacher = built.search_engine("plain", logits[:stage]).problems["teacher"]
        assert len(teacher.module.cells) == stage + 3
        assert {len(names) for names in teacher.module.space.choices("reduce")} == {(8, 5, 3)[stage]}


def test_what_is_dropped_follows_the_logits():
    search = Search(space="p_darts")
    order = torch.arange(8.0).expand(14, 8)
    space = search.stage_space([ArchitectureLogits(order, -order)])
    assert space.choices("normal")[0] == space.operations[3:]
    assert space.choices("reduce")[0] == space.operations[:5]


def test_the_architecture_waits_for_its_warmup():
    search = {"channels": 1, "cells": 3, "warmup": 2, "batch_size": 10, "architecture_clip": 0.5}
    engine = job(search=search).search_engine("lbt")
    arch = engine.problems["arch"]
    assert arch.clip_norm == 0.5
    before = arch.module.normal.detach().clone()
    engine.run(2)
    assert torch.equal(arch.module.normal, before)
    engine.run(1)
    assert not torch.equal(arch.module.normal, before)


def test_first_order_leaves_out_the_teacher_alone():
    first = job(search={"channels": 1, "cells": 3, "batch_size": 10}, teacher_hypergradient="first_order")
    assert first.title("plain") == "DARTS-1st"
    assert first.title("lbt") == "LBT(small, DARTS-1st)"
    engine = first.search_engine("lbt")
    engine.run(2)
    passes = engine.passes
    assert sum(passes["student"].values()) > 2, "the student is differentiated through"
    assert engine.report().lookahead is False
    gradients = []
    for weight in (0.0, 1.0):
        engine.problems["arch"].student_weight = weight
        gradients.append(torch.cat([g.flatten() for g in engine.hypergradient("arch").values()]))
    assert not torch.equal(*gradients), "the student's part comes by the pseudo-labels' own dependence"


def test_titles_are_the_papers():
    assert job(student="resnet18", search={"space": "p_darts"}).title("lbt") == "LBT(RN18, P-DARTS)"
    assert job(student="resnet50").title("lbt") == "LBT(RN50, DARTS-2nd)"
    assert job(search={"space": "pc_darts"}).title("plain") == "PC-DARTS"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": "p_darts", "cells": [1, 2]}, "cells has 2 entries, but the search has 3 stages"),
        ({"space": "darts", "cells": [2]}, "cells must be at least 3; with fewer, a supernet has only reduction cells"),
        ({"space": "pc_darts", "channels": 6}, "channels: 6 cannot be divided by 4 (partial); write a multiple of 4"),
        ({"operations": ["skip_connect", "conv"]}, "'conv' is not an operation"),
        (
            {"space": "p_darts", "operations": ["noise", "skip_connect"]},
            "drops [3, 2] leaves no operation, since there are 2",
        ),
        ({"operations": ["noise"]}, "operations has fewer than two names"),
        ({"skip_dropout": 1.0}, "skip_dropout must be at least 0 and below 1"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_an_error(options, message):
    with pytest.raises(ValueError, match=r".") as caught:
        parse(Search, options)
    assert message in str(caught.value)


def test_the_papers_path_needs_the_teachers_training():
    with pytest.raises(ValueError, match="the student has no effect on the architecture"):
        job(teacher_hypergradient="first_order", pseudo_label_path="paper")


def test_the_levels_report_the_health_of_the_search():
    engine = job(search={"channels": 1, "cells": 3, "batch_size": 10}).search_engine("plain")
    engine.run(1)
    metrics = engine.metrics()
    assert metrics["arch/normal/entropy"] == pytest.approx(1, abs=1e-2)
    assert 0 <= metrics["arch/skips"] <= 8
    assert sum(v for k, v in metrics.items() if k.startswith("arch/normal/") and "entropy" not in k) == pytest.approx(1)
