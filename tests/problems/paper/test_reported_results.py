"""The reported numbers equal a second transcription of the paper, and the runs of the tables match their labels."""

from __future__ import annotations

import pytest

from problems.paper import reported_results
from problems.paper.figures import Benefit, Figure3, Figure4
from problems.paper.reported_results import Row
from problems.paper.tables import Table4

# each row: label as in the paper, error, deviation, parameters, GPU-days; "-" where the paper gives none
CIFAR = {
    "TABLE2": """
        DARTS-1st            20.52 0.31 1.8 0.4
        LBT(RN18, DARTS-1st) 19.28 0.13 1.9 0.5
        LBT(RN50, DARTS-1st) 18.74 0.09 1.9 0.6
        DARTS-2nd            20.58 0.44 1.8 1.5
        LBT(RN18, DARTS-2nd) 17.93 0.18 2.0 1.9
        LBT(RN50, DARTS-2nd) 17.06 0.22 2.1 2.2
        P-DARTS              17.49 -    3.6 0.3
        LBT(RN18, P-DARTS)   16.53 0.16 3.6 0.5
        LBT(RN50, P-DARTS)   16.29 0.07 3.7 0.6
        PC-DARTS             17.96 0.15 3.9 0.1
        LBT(RN18, PC-DARTS)  17.21 0.13 3.8 0.1
        LBT(RN50, PC-DARTS)  16.88 0.09 3.8 0.2
    """,
    "TABLE3": """
        DARTS-1st            3.00 0.14 3.3 0.4
        LBT(RN18, DARTS-1st) 2.87 0.05 3.2 0.6
        LBT(RN50, DARTS-1st) 2.79 0.07 3.3 0.7
        DARTS-2nd            2.76 0.09 3.3 1.5
        LBT(RN18, DARTS-2nd) 2.65 0.03 3.4 1.9
        LBT(RN50, DARTS-2nd) 2.61 0.05 3.4 2.1
        P-DARTS              2.50 -    3.4 0.3
        LBT(RN18, P-DARTS)   2.64 0.11 3.4 0.4
        LBT(RN50, P-DARTS)   2.57 0.15 3.4 0.5
        PC-DARTS             2.57 0.07 3.6 0.1
        LBT(RN18, PC-DARTS)  2.59 0.03 3.7 0.1
        LBT(RN50, PC-DARTS)  2.56 0.04 3.7 0.2
    """,
    "TABLE5": """
        Student only (CIFAR-100)      20.27 0.24 - -
        Student + teacher (CIFAR-100) 17.93 0.18 - -
        Student only (CIFAR-10)       3.01  0.08 - -
        Student + teacher (CIFAR-10)  2.61  0.05 - -
    """,
    "TABLE6": """
        Pseudo labels only (CIFAR-100)           19.82 0.31 - -
        Pseudo labels + human labels (CIFAR-100) 17.93 0.18 - -
        Pseudo labels only (CIFAR-10)            2.93  0.07 - -
        Pseudo labels + human labels (CIFAR-10)  2.61  0.05 - -
    """,
}
# each row: label, top-1 error, top-5 error, parameters, GPU-days
IMAGENET = """
    DARTS-2nd(CIFAR10)               26.7 8.7 4.7 1.5
    LBT(RN50, DARTS-2nd, CIFAR10)    25.5 7.9 4.8 2.1
    P-DARTS(CIFAR10)                 24.4 7.4 4.9 0.3
    LBT(RN50, P-DARTS, CIFAR10)      24.1 7.2 4.9 0.5
    P-DARTS(CIFAR100)                24.7 7.5 5.1 0.3
    LBT(RN50, P-DARTS, CIFAR100)     24.2 7.1 5.3 0.6
    PC-DARTS(ImageNet)               24.2 7.3 5.3 3.8
    LBT(RN50, PC-DARTS, ImageNet)    23.5 6.8 5.4 4.1
"""
SPACES = {"DARTS-1st": "darts1", "DARTS-2nd": "darts2", "P-DARTS": "pdarts", "PC-DARTS": "pcdarts"}


def transcribed(text: str) -> list[tuple[str, list[float | None]]]:
    lines = (line.rsplit(maxsplit=4) for line in text.strip().splitlines())
    return [(label.strip(), [None if n == "-" else float(n) for n in numbers]) for label, *numbers in lines]


@pytest.mark.parametrize("table", CIFAR)
def test_the_numbers_on_cifar_are_the_papers(table):
    rows = [row for row in getattr(reported_results, table) if row.reported is not None]
    found = [(r.label, [r.reported.error, r.reported.deviation, r.reported.parameters, r.reported.cost]) for r in rows]
    assert found == transcribed(CIFAR[table])
    assert all(row.reported.top5_error is None for row in rows)


def test_the_numbers_on_imagenet_are_the_papers():
    rows = reported_results.TABLE4
    found = [(r.label, [r.reported.error, r.reported.top5_error, r.reported.parameters, r.reported.cost]) for r in rows]
    assert found == transcribed(IMAGENET)
    assert all(row.reported.deviation is None for row in rows)


@pytest.mark.parametrize(
    ("row", "data", "name"),
    [
        (row, data, row.label)
        for table, data in (("TABLE2", "cifar100"), ("TABLE3", "cifar10"))
        for row in getattr(reported_results, table)
        if row.reported is not None
    ],
    ids=str,
)
def test_the_run_of_a_row_matches_its_label(row: Row, data: str, name: str):
    inside = name.removeprefix("LBT(").removesuffix(")").split(", ")
    student = inside[0].lower() if len(inside) == 2 else None
    assert (row.run.data, row.run.space, row.run.student) == (data, SPACES[inside[-1]], student)


@pytest.mark.parametrize("row", reported_results.TABLE4, ids=lambda row: row.label)
def test_the_run_of_a_row_on_imagenet_matches_its_label(row: Row):
    name, _, inside = row.label.partition("(")
    words = inside.removesuffix(")").split(", ")
    student, space, data = (words[0].lower(), *words[1:]) if name == "LBT" else (None, name, words[0])
    assert (row.run.data, row.run.space, row.run.student) == ("imagenet", SPACES[space], student)
    if data == "ImageNet":
        assert row.searched is None
    else:
        searched = row.searched
        assert searched is not None
        assert (searched.data, searched.space, searched.student) == (data.lower(), SPACES[space], student)


@pytest.mark.parametrize("rows", [reported_results.TABLE5, reported_results.TABLE6])
def test_an_ablation_differs_from_the_full_method_as_its_label_says(rows):
    for row in rows:
        data = {"CIFAR-100": "cifar100", "CIFAR-10": "cifar10"}[row.label.split("(")[1].rstrip(")")]
        run = row.run
        assert (run.data, run.space, run.student) == (data, "darts2", "rn18")
        assert (run.pseudo_weight, run.student_weight) == (1.0, 1.0)
        assert run.judged_by == ("student" if row.label.startswith("Student only") else "both")
        assert run.student_learns_from == ("pseudo_labels" if row.label.startswith("Pseudo labels only") else "both")


def measured(error: float, seconds: float) -> dict[str, dict[str, float]]:
    sizes = {"parameters": 2e6, "multiply_adds": 5e6}
    return {"any": {"test_error": error, "search_seconds": seconds, "train_seconds": 1.0, **sizes}}


def test_the_cost_of_a_transfer_is_that_of_its_search(tmp_path):
    experiment = Table4()
    keys = experiment.runs("laptop")
    results, costs = {}, {}
    for n, (key, wanted) in enumerate(keys.items()):
        costs[key] = 1000.0 + n
        rows = {seed: measured(40.0 + n, costs[key]) for seed in range(2)}
        if wanted.job == "evaluate":  # it did not search
            for seed in rows.values():
                del seed["any"]["search_seconds"]
        results[key] = rows
    page, *_ = experiment.write("laptop", results, tmp_path)
    lines = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    for row in reported_results.TABLE4:
        (line, *_) = (line for line in lines if line.startswith(f"| {row.label} "))
        searched = row.run.key if row.searched is None else row.searched.key
        assert [cell.strip() for cell in line.strip("|").split("|")][4] == f"{costs[searched]:.0f} ± 0"
    assert len({costs[row.searched.key] for row in reported_results.TABLE4 if row.searched}) == 6


@pytest.mark.parametrize(
    ("figure", "option", "other"),
    [(Figure3, "pseudo_weight", "student_weight"), (Figure4, "student_weight", "pseudo_weight")],
)
@pytest.mark.parametrize(("scale", "train"), [("laptop", 1000), ("paper", 22_500)])
def test_only_the_trade_off_varies_and_the_error_is_on_held_out_images(figure, option, other, scale, train):
    runs = [wanted.options for wanted in figure().runs(scale).values()]
    assert len(runs) == 6
    for source in {options["data"]["source"] for options in runs}:
        of_source = [options for options in runs if options["data"]["source"] == source]
        assert [options[option] for options in of_source] == [0.1, 1.0, 10.0]
    for options in runs:
        assert options[other] == 1.0
        assert (options["data"]["held_out_size"], options["data"]["train_size"]) == (5000, train)
        assert (options["methods"], options["judged_by"]) == (["lbt"], "both")
        assert "teacher_hypergradient" not in options


def test_the_runs_of_the_benefit_match_their_labels():
    labels, runs = Benefit.labels, Benefit().runs("laptop")
    options = {label: runs[key].options for label, (key, _) in labels.items()}
    found = {label: (o["methods"], o["student_weight"], o["judged_by"]) for label, o in options.items()}
    assert found == {
        "random": (["random"], 1.0, "both"),
        "best of 4 random": (["best_of_random"], 1.0, "both"),
        "DARTS-2nd": (["plain"], 1.0, "both"),
        "LBT, γ = 1": (["lbt"], 1.0, "both"),
        "LBT, γ = 20": (["lbt"], 20.0, "both"),
        "LBT, student alone": (["lbt"], 1.0, "student"),
    }
