"""The pages: each row has its numbers, and the text about significance agrees with the tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlo.reports.compare import paired
from problems.paper.experiment import LAPTOP_NOTE
from problems.paper.figures import SETTING, Benefit, Figure3, Figure4
from problems.paper.pages import DIFFERENCES, Comparison, comparison_table, result_table, spread, verdict
from problems.paper.reported_results import TABLE3, TABLE4
from problems.paper.tables import Table2, Table3, Table4, Table5, Table6


def measures(error: float, **more: object) -> dict[str, object]:
    return {
        "title": "x",
        "test_error": error,
        "parameters": 2_000_000,
        "multiply_adds": 5e6,
        "search_seconds": 90,
        **more,
    }


def seeds(*errors: float) -> dict[int, dict[str, object]]:
    return {seed: measures(error) for seed, error in enumerate(errors)}


def cells(table: str, label: str) -> list[str]:
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {label} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_has_its_own_numbers_and_those_of_the_paper():
    found = {row.label: seeds(50.0 + n, 52.0 + n) for n, row in enumerate(TABLE3)}
    laptop = cells(result_table(TABLE3, found, "laptop"), "LBT(RN50, P-DARTS)")
    n = [row.label for row in TABLE3].index("LBT(RN50, P-DARTS)")
    error = spread([50.0 + n, 52.0 + n])
    assert laptop[1:] == [error, "2.000 ± 0.000", "5.0 ± 0.0", "90 ± 0", "2.57 ± 0.15", "3.4", "0.5"]
    paper = result_table(TABLE3, found, "paper")
    assert cells(paper, "random")[-3:] == ["-", "-", "-"]
    assert "GPU-days" in paper.splitlines()[0]


def test_imagenet_has_top_5_errors():
    found = {row.label: seeds(70.0) for row in TABLE4}
    assert cells(result_table(TABLE4, found, "laptop"), "LBT(RN50, P-DARTS, CIFAR100)")[-3] == "24.2 / 7.1"


def test_each_method_is_compared_to_the_same_without_a_student():
    pairs = Table3().comparisons()
    assert len(pairs) == 8
    assert Comparison("LBT(RN18, PC-DARTS)", "PC-DARTS") in pairs
    assert Table4().comparisons()[-1] == Comparison("LBT(RN50, PC-DARTS, ImageNet)", "PC-DARTS(ImageNet)")
    assert Table5().comparisons()[0] == Comparison("Student + teacher (CIFAR-100)", "Student only (CIFAR-100)")


def test_differences_are_paired_by_seed_and_the_verdict_agrees_with_them():
    found = {"a": seeds(1, 2, 3, 4, 5), "b": seeds(3.1, 4, 5, 6, 7), "c": seeds(1.1, 1.9, 3.1, 3.9, 5.0)}
    test = paired({n: float(n + 1) for n in range(5)}, {0: 3.1, **{n: n + 3.0 for n in range(1, 5)}})
    row = cells(comparison_table([Comparison("a", "b")], found), "a")
    assert row[2:] == ["-2.02", f"{test.low:+.2f} to {test.high:+.2f}", f"{test.p:.3f}", "5"]
    assert "p is at most 0.05 for none of these 2 differences. With 5 seeds, p is at least 0.062" in verdict(
        [Comparison("a", "b"), Comparison("c", "a")], found
    )
    found = {
        "a": seeds(*range(1, 9)),
        "b": seeds(*(n + 2.1 + n / 9 for n in range(1, 9))),
        "c": seeds(1.1, 1.9, 3.1, 3.9, 5.1, 5.9, 7.1, 7.9),
    }
    text = verdict([Comparison("a", "b"), Comparison("c", "a")], found)
    assert "p is at most 0.05 for 1 of these 2 differences: a has a lower error." in text
    assert "p is at least" not in text
    assert "b has a higher error" in verdict([Comparison("b", "a")], found)
    assert "for none of these 1 differences." in verdict([Comparison("c", "a")], found)


@pytest.mark.parametrize("kind", [Table2, Table3, Table4, Figure3, Benefit])
def test_a_page_is_written_from_the_results_of_its_runs(tmp_path, kind):
    experiment = kind()
    keys = list(experiment.runs("laptop"))
    results = {
        key: {
            seed: {"any": measures(40.0 + n + seed / 7, noise=1, skip_connect=2, student_part=0.5)} for seed in range(4)
        }
        for n, key in enumerate(keys)
    }
    json.dumps(results)
    page, *pictures = experiment.write("laptop", results, tmp_path)
    text = page.read_text()
    assert text.startswith(f"# {experiment.title}\n\n{experiment.about}\n\n")
    assert f"mlo reproduce {experiment.name} --scale laptop" in text
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert text.count("](") == len(pictures)
    assert "seed 3" in text


@pytest.mark.parametrize("kind", [Table2, Table3, Table4, Table5, Table6, Figure3, Figure4, Benefit])
def test_the_documented_page_has_the_words_that_the_experiment_writes(kind):
    experiment = kind()
    text = (Path(__file__).parents[3] / "docs" / "experiments" / f"{experiment.name}.md").read_text()
    assert text.startswith(f"# {experiment.title}\n\n{experiment.about}\n\n")
    for words in (
        SETTING if kind is Benefit else LAPTOP_NOTE,
        DIFFERENCES,
        f"mlo reproduce {experiment.name} --scale laptop",
    ):
        assert words in text
    assert getattr(experiment, "note", "") in text
