"""The page and the pictures: each shows what its title says."""

from __future__ import annotations

import json

import pytest

from mlo.runs.run import Run
from problems.jobs import report
from problems.jobs.lbt import LbtJob
from problems.nas import DARTS, PUBLISHED

RESULT = {"title": "LBT(RN18, DARTS-2nd)", "test_error": 12.345, "test_images": 99, "parameters": 6789}


@pytest.fixture
def run(tmp_path):
    run = Run.create("lbt", LbtJob(), tmp_path / "run")
    for stage in ("search-lbt", "train-lbt", "train-random"):
        losses = {"network/loss": 2.0}
        folder = run.path / "stages" / stage
        folder.mkdir(parents=True)
        weights = {f"arch/{kind}/{name}": 0.125 for kind in ("normal", "reduce") for name in DARTS.operations}
        weights |= {"arch/skips": 2.0, "arch/normal/entropy": 0.9, "arch/reduce/entropy": 0.8}
        lines = [json.dumps({"step": step, **losses, **weights}) for step in (1, 2)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return run


def test_cells_are_drawn_under_their_own_names(run, monkeypatch):
    drawn, saved = {}, {}
    real, save = report.draw_cell, report._save

    def watched(genotype, kind):
        figure = real(genotype, kind)
        drawn[id(figure)] = (genotype, kind)
        return figure

    monkeypatch.setattr(report, "draw_cell", watched)
    monkeypatch.setattr(report, "_save", lambda figure, path: saved.update({path.name: figure}) or save(figure, path))
    report.write_report(run, {"lbt": PUBLISHED["DARTS_V2"]}, {"lbt": RESULT}, {"lbt": ["search-lbt"]}, "About it.")
    assert drawn[id(saved["lbt-normal-cell.png"])] == (PUBLISHED["DARTS_V2"], "normal")
    assert drawn[id(saved["lbt-reduction-cell.png"])] == (PUBLISHED["DARTS_V2"], "reduce")


def test_the_page_says_what_came_out(run):
    found = {"lbt": PUBLISHED["DARTS_V2"], "random": PUBLISHED["PDARTS"]}
    report.save_genotypes(run, found)
    page = report.write_report(
        run,
        found,
        {
            "lbt": RESULT,
            "random": {"title": "Random architecture", "test_error": 50.0, "test_images": 99, "parameters": 1},
        },
        {"lbt": ["search-lbt"], "random": []},
        "Some words about it.",
    ).read_text()
    assert "Some words about it." in page
    assert "on 99 other images" in page
    assert "12.35" in page or "12.34" in page
    assert "6,789" in page
    assert "Random architecture" in page
    assert "LBT(RN18, DARTS-2nd)" in page
    assert json.loads((run.path / "genotype.json").read_text())["normal"][0][0][0] == "sep_conv_3x3"
    assert json.loads((run.path / "genotype-random.json").read_text())["normal"][0][0][0] == "skip_connect"


def test_curves_show_the_logged_numbers():
    lines = [{"step": s, "teacher/loss": 1.0 / s, "arch/loss": float(s)} for s in (1, 2, 4)]
    axes = report.loss_curves(lines).axes[0]
    curves = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
    assert curves == {"teacher": ([1, 2, 4], [1.0, 0.5, 0.25]), "arch": ([1, 2, 4], [1.0, 2.0, 4.0])}
    weights = [
        {"step": 1, **{f"arch/{k}/{o}": i / 10 for k in ("normal", "reduce") for i, o in enumerate(DARTS.operations)}}
    ]
    panels = report.weight_curves(weights).axes
    assert [p.get_title() for p in panels[:2]] == ["normal cell", "reduction cell"]
    assert [list(line.get_ydata()) for line in panels[1].get_lines()] == [[i / 10] for i in range(8)]


def test_the_stages_of_a_search_are_one_curve():
    stages = [[{"step": 1, "a": 1}, {"step": 2, "a": 2}], [{"step": 1, "a": 3}, {"step": 3, "a": 4}]]
    assert [(line["step"], line["a"]) for line in report._joined(stages)] == [(1, 1), (2, 2), (3, 3), (5, 4)]
    assert report._joined([]) == []
