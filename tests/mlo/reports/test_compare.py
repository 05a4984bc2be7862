"""Comparisons of finished runs: which belong together, the numbers, and each form in which they are written."""

import csv
import io
import itertools
import json
import re
from pathlib import Path

import pytest
import yaml

from mlo.errors import ConfigError
from mlo.reports.compare import Group, groups, interval, load, paired
from mlo.reports.tables import draw, table


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def finished(tmp_path):
    """Lay down a run folder as a finished run leaves it."""

    def lay(name, seed, rows, job="toy", **options):
        path = tmp_path / name
        path.mkdir(parents=True)
        (path / "run.json").write_text(json.dumps({"job": job, "versions": {}}))
        (path / "config.yaml").write_text(yaml.safe_dump({"seed": seed, **options}))
        if rows is not None:
            (path / "results.json").write_text(json.dumps(rows))
        return path

    return lay


ERRORS = {"plain": {0: 5.0, 1: 7.0, 2: 6.0, 3: 9.0}, "lbt": {0: 4.0, 1: 5.0, 2: 5.5, 3: 6.0}}


@pytest.fixture
def both(finished, tmp_path):
    """Two rows over four seeds; of one, the folders are in another order than the seeds, and a seed more is there."""
    for seed in range(4):
        rows = {"plain": {"error": ERRORS["plain"][seed], "note": "x", "weights": 100}}
        finished(f"plain/{seed}", seed, rows, method="plain", threads=1)
    for place, seed in enumerate([3, 1, 0, 2]):
        rows = {"lbt": {"error": ERRORS["lbt"][seed], "weights": 120}}
        finished(f"lbt/{place}", seed, rows, method="lbt", threads=1)
    finished("lbt/more", 9, {"lbt": {"error": 5.0, "weights": 120}}, method="lbt", threads=1)
    return groups(load([tmp_path / "plain", tmp_path / "lbt"]))


def test_runs_that_differ_in_the_seed_alone_belong_together(both):
    assert [group.label for group in both] == ["plain, method=plain", "lbt, method=lbt"]
    assert both[0].values("error") == ERRORS["plain"]
    assert both[1].values("error") == ERRORS["lbt"] | {9: 5.0}
    assert both[0].values("note") == {}


def test_runs_that_take_a_file_of_the_run_with_their_seed_belong_together(finished, tmp_path):
    for seed in (1, 11):
        for name in ("a", "b"):
            given = f"runs/{name}/seed-{seed}/genotype.json"
            finished(f"{name}/{seed}", seed, {"network": {"error": 1.0}}, genotype=given)
    finished("c", 1, {"network": {"error": 1.0}}, genotype="runs/c/seed-11/genotype.json")
    finished("d", 1, {"network": {"error": 1.0}}, genotype="s/rate=0.5,seed=1")
    finished("e", 1, {"network": {"error": 1.0}}, genotype="s/reseed=1,preseed-1")
    labels = {group.label: list(group.seeds) for group in groups(load([tmp_path]))}
    assert labels == {
        "network, genotype=runs/a/seed-*/genotype.json": [1, 11],
        "network, genotype=runs/b/seed-*/genotype.json": [1, 11],
        "network, genotype=runs/c/seed-11/genotype.json": [1],
        "network, genotype=s/rate=0.5,seed=*": [1],
        "network, genotype=s/reseed=1,preseed-1": [1],
    }


def test_pairs_are_made_by_seed():
    found = paired({2: 30.0, 0: 11.0, 1: 22.0, 7: 1.0}, {0: 10.0, 1: 20.0, 2: 27.0, 8: 5.0})
    assert (found.mean, found.n) == (2.0, 3)
    assert (found.low, found.high) == (1.0, 3.0)  # three equal draws of the least have probability 1/27 > 2.5 %
    assert found.p == pytest.approx(2 / 8)  # all three of one sign, either way, of 2^3


@pytest.mark.parametrize("differences", [[1.0, 2.0, 0.5, 3.0], [1.0, -2.0, 0.5, 3.0, 4.0]])
def test_p_is_the_share_of_sign_flips_that_are_as_extreme(differences):
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in itertools.product([1, -1], repeat=len(differences))
    ]
    extreme = sum(abs(total) >= abs(sum(differences)) - 1e-12 for total in sums)
    found = paired(dict(enumerate(differences)), dict.fromkeys(range(len(differences)), 0.0))
    assert found.p == pytest.approx(extreme / len(sums))


def test_the_interval_is_that_of_all_resamples():
    values = [1.0, 2.0, 4.0, 9.0]
    means = sorted(sum(drawn) / 4 for drawn in itertools.product(values, repeat=4))
    low, high = interval(values)
    assert means[int(0.025 * 256)] == pytest.approx(low, abs=0.25)
    assert means[int(0.975 * 256)] == pytest.approx(high, abs=0.25)
    assert interval(values) == (low, high)


@pytest.mark.parametrize(("a", "mean", "n"), [({0: 3.0, 1: 5.0}, 3.0, 2), ({4: 1.0}, None, 0)])
def test_of_few_pairs_no_more_is_said_than_the_mean(a, mean, n):
    found = paired(a, {0: 1.0, 1: 1.0})
    assert (found.mean, found.low, found.high, found.p, found.n) == (mean, None, None, None, n)


def test_a_run_repeated_is_no_evidence():
    found = paired(dict.fromkeys(range(6), 0.5), dict.fromkeys(range(6), 0.4))
    assert (found.low, found.high, found.p, found.n) == (None, None, None, 6)
    assert found.mean == pytest.approx(0.1)
    assert paired(dict.fromkeys(range(6), 0.5), {n: 0.1 * n for n in range(6)}).p is not None


def test_the_table_has_mean_deviation_and_difference(both):
    lines = [re.split(r" {2,}", line.strip()) for line in table(both).splitlines()]
    assert lines[0] == ["seeds", "error", "weights", "error: difference", "95 % interval", "p", "pairs"]
    # deviations by hand: sqrt((1.75² + 0.25² + 0.75² + 2.25²) / 3) and sqrt((1.1² + 0.1² + 0.4² + 0.9² + 0.1²) / 4)
    assert lines[2] == ["plain, method=plain", "4", "6.8 ± 1.7", "100 ± 0", "baseline", "-", "-", "-"]
    assert lines[3][:5] == ["lbt, method=lbt", "5", "5.10 ± 0.74", "120 ± 0", "-1.62"]
    assert lines[3][6:] == ["0.12", "4"]  # 2 of 16


def test_another_baseline_turns_the_difference(both):
    last = table(both, baseline="lbt, method=lbt").splitlines()
    assert "+1.62" in last[2]
    assert "baseline" in last[3]


def test_csv_is_run_by_run_with_a_column_for_each_thing(finished, tmp_path):
    for seed, (kind, more) in itertools.product((1, 0), (("cg", {"damping": 0.5}), ("darts", {}))):
        rows = {"a, b": {"error": seed + 0.25, "title": "LBT(small, DARTS)"}, "plain": {"size": 3}}
        options = {"hypergradient": {"kind": kind, **more}, "tags": [kind, "x"], "threads": 1}
        finished(f"{kind}/{seed}", seed, rows, **options)
    finished("cg/other", 0, {"plain": {"size": 4}}, hypergradient={"kind": "cg", "damping": None}, tags=["x"])
    head, *lines = csv.reader(io.StringIO(table(groups(load([tmp_path])), form="csv")))
    named = ["option.hypergradient.damping", "option.hypergradient.kind", "option.tags", "option.threads"]
    assert head == ["row", *named, "seed", "error", "title", "size"]
    title = "LBT(small, DARTS)"
    assert sorted(lines) == [
        ["a, b", "", "darts", "[darts, x]", "1", "0", "0.25", title, ""],
        ["a, b", "", "darts", "[darts, x]", "1", "1", "1.25", title, ""],
        ["a, b", "0.5", "cg", "[cg, x]", "1", "0", "0.25", title, ""],
        ["a, b", "0.5", "cg", "[cg, x]", "1", "1", "1.25", title, ""],
        ["plain", "", "darts", "[darts, x]", "1", "0", "", "", "3"],
        ["plain", "", "darts", "[darts, x]", "1", "1", "", "", "3"],
        ["plain", "0.5", "cg", "[cg, x]", "1", "0", "", "", "3"],
        ["plain", "0.5", "cg", "[cg, x]", "1", "1", "", "", "3"],
        ["plain", "null", "cg", "[x]", "", "0", "", "", "4"],
    ]


def test_csv_has_the_seeds_in_order(finished, tmp_path):
    for folder, seed in (("a", 10), ("b", 2), ("c", 0)):
        finished(folder, seed, {"plain": {"error": 1.0}})
    text = table(groups(load([tmp_path])), form="csv")
    assert text == "row,seed,error\nplain,0,1.0\nplain,2,1.0\nplain,10,1.0\n"


def test_csv_has_results_that_are_text_alone(finished, tmp_path):
    finished("a", 0, {"plain": {"title": "LBT"}})
    assert table(groups(load([tmp_path])), form="csv") == "row,seed,title\nplain,0,LBT\n"


def test_no_two_columns_of_csv_have_one_name(finished, tmp_path):
    for rate in (1, 2):
        rows = {"plain": {"seed": 7, "row": "x", "option.rate": 5, "option.other": 6}}
        finished(f"{rate}", 0, rows, rate=rate)
    head, line, _ = table(groups(load([tmp_path])), form="csv").splitlines()
    assert head == "row,option.rate,seed,measure.seed,measure.row,measure.option.rate,option.other"
    assert line == "plain,1,0,7,x,5,6"


def test_csv_says_enough_for_the_statistics_of_the_table(both):
    rows = list(csv.DictReader(io.StringIO(table(both, form="csv"))))
    for group in both:
        errors = {int(r["seed"]): float(r["error"]) for r in rows if r["option.method"] == group.options["method"]}
        assert errors == group.values("error")


def test_markdown_and_latex_have_the_cells_of_the_text(both):
    both = [Group("a|b_c", group.options, group.seeds) for group in both]
    cells = [re.split(r" {2,}", line.strip()) for line in table(both).splitlines()[2:]]
    markdown = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in table(both, form="markdown").splitlines()[2:]
    ]
    assert [[cell.replace("\\|", "|") for cell in row] for row in markdown] == cells
    body = table(both, form="latex").split("\\midrule\n")[1].split("\\bottomrule")[0]
    latex = [[cell.strip() for cell in line.removesuffix("\\\\").split(" & ")] for line in body.splitlines()]
    assert [[cell.replace("\\_", "_").replace("$\\pm$", "±") for cell in row] for row in latex] == cells


def wide(options, measures, rows=2):
    """Groups with so many options and measures; only the first of each differs between the rows."""
    return [
        Group(
            "network",
            {f"a.long.name.of.an.option.{n}": row if n == 0 else 0.5 for n in range(options)},
            {seed: {f"measure_{n}": seed + row * (n == 0) for n in range(measures)} for seed in range(3)},
        )
        for row in range(rows)
    ]


def test_text_that_is_too_wide_has_what_all_rows_share_below(monkeypatch):
    compared = wide(options=1, measures=5)
    assert "the same in all rows" not in table(compared)
    monkeypatch.setenv("COLUMNS", "120")
    lines = table(compared).splitlines()
    assert max(map(len, lines)) <= 120
    head = re.split(r" {2,}", lines[0].strip())
    assert head == ["measure_0", "measure_0: difference", "95 % interval", "p", "pairs"]
    assert [line.split("  ")[0] for line in lines[2:4]] == [group.label for group in compared]
    shared = ", ".join(f"measure_{n} 1.0 ± 1.0" for n in range(1, 5))
    assert lines[4:] == ["", f"the same in all rows: seeds 3, {shared}"]


def test_labels_that_are_too_wide_are_wrapped_between_options(monkeypatch):
    compared = [
        Group(
            "network",
            {"rate": row, "steps": 10, "momentum": 0.9, "mode": "on"},
            {seed: {"e": row + seed} for seed in range(3)},
        )
        for row in (1, 2)
    ]
    monkeypatch.setenv("COLUMNS", str(max(map(len, table(compared).splitlines())) - 20))
    lines = table(compared).splitlines()
    labels = [line[: lines[1].index(" ")].rstrip() for line in lines[2:6]]
    assert labels == [
        "network, rate=1, steps=10,",
        "  momentum=0.9, mode=on",
        "network, rate=2, steps=10,",
        "  momentum=0.9, mode=on",
    ]
    assert "baseline" in lines[2]


def test_text_that_is_still_too_wide_has_a_block_for_each_row(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    compared = wide(options=6, measures=3)
    text = table(compared)
    blocks = text.split("\n\n")
    assert max(map(len, text.splitlines())) <= 80
    assert len(blocks) == 3
    for group, block in zip(compared, blocks, strict=False):
        label, _, cells = block.partition("\n    ")
        assert " ".join(label.split()) == group.label
        assert [line.split()[0] for line in f"    {cells}".splitlines()] == [
            "measure_0",
            "measure_0:",
            "95",
            "p",
            "pairs",
        ]
    assert "    measure_0              2.0 ± 1.0\n" in blocks[1]
    assert blocks[2].startswith("the same in all rows: seeds 3, measure_1 1.0 ± 1.0, ")
    (only,) = table(compared[:1]).split("\n\n")
    assert "    seeds      3\n    measure_0  1.0 ± 1.0\n" in only


@pytest.mark.parametrize("form", ["markdown", "latex", "csv"])
def test_other_forms_are_whole_however_wide(monkeypatch, form):
    monkeypatch.setenv("COLUMNS", "80")
    text = table(wide(options=6, measures=3), form=form).replace("\\_", "_")
    assert max(map(len, text.splitlines())) > 80
    assert all(f"measure_{n}" in text for n in range(3))


def test_one_seed_has_no_deviation_and_what_a_row_lacks_is_a_dash(finished, tmp_path):
    finished("a", 0, {"x": {"error": 0.123456, "size": 12345678}, "y": {"error": 2}})
    lines = [re.split(r" {2,}", line.strip()) for line in table(groups(load([tmp_path]))).splitlines()]
    assert lines[2][:4] == ["x", "1", "0.1235", "12345678"]
    assert lines[3] == ["y", "1", "2", "-", "+1.88", "-", "-", "1 (fewer than 3)"]


def test_options_below_a_kind_count_among_their_kind(finished, tmp_path):
    for number, options in enumerate(
        [{"kind": "cg", "damping": 0.1}, {"kind": "darts", "radius": 1.0}, {"kind": "darts", "radius": 2.0}]
    ):
        finished(f"run-{number}", 0, {"r": {"e": 1.0}}, hypergradient=options)
    labels = [group.label for group in groups(load([tmp_path]))]
    assert labels == [
        "r, hypergradient=cg",
        "r, hypergradient=darts, hypergradient.radius=1.0",
        "r, hypergradient=darts, hypergradient.radius=2.0",
    ]


def test_rows_of_different_jobs_are_kept_apart(finished, tmp_path):
    finished("a", 0, {"r": {"e": 1.0}}, job="one")
    finished("b", 0, {"r": {"e": 2.0}}, job="two")
    assert [group.label for group in groups(load([tmp_path]))] == ["r, job=one", "r, job=two"]


def test_a_run_given_twice_counts_once_and_a_copy_of_it_is_reported(finished, tmp_path, capsys):
    run = finished("a", 0, {"r": {"e": 1.0}})
    finished("b", 0, {"r": {"e": 3.0}})
    (group,) = groups(load([run, tmp_path]))
    assert group.values("e") == {0: 1.0}
    assert f"{tmp_path / 'b'} is left out, since another run has the same options and seed" in capsys.readouterr().err


def test_unfinished_runs_are_reported_and_left_out(finished, tmp_path, capsys):
    finished("a", 0, {"r": {"e": 1.0}})
    open_run = finished("b", 1, None)
    assert [result.seed for result in load([tmp_path])] == [0]
    assert f"{open_run} is not finished" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no finished run"):
        load([open_run])
    with pytest.raises(ConfigError, match="no run folder there"):
        load([tmp_path / "nowhere"])


def test_a_numeric_option_is_the_axis_and_other_options_are_columns(finished, tmp_path, monkeypatch):
    import mlo.reports.tables

    drawn = []
    monkeypatch.setattr(mlo.reports.tables, "_curves", lambda *_: drawn.append("curves"))
    monkeypatch.setattr(mlo.reports.tables, "_columns", lambda *_: drawn.append("columns"))
    numbers = [finished(f"n/{rate}", 0, {"r": {"e": rate}}, rate=rate, mode="on") for rate in (0.1, 0.2)]
    words = [finished(f"w/{mode}", 0, {"r": {"e": 1.0}}, rate=0.1, mode=mode) for mode in ("on", "off")]
    for place, runs in enumerate([numbers, words, numbers + words[1:]]):
        draw(groups(load(runs)), tmp_path / f"{place}.svg")
    assert drawn == ["curves", "columns", "columns"]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_pictures_are_drawn(finished, tmp_path, suffix):
    for seed, rate in itertools.product(range(3), (0.1, 0.2)):
        finished(f"{rate}-{seed}", seed, {"r": {"e": rate + seed}, "q": {"e": seed} if rate < 0.2 else {}}, rate=rate)
    compared = groups(load([tmp_path]))
    draw(compared, tmp_path / f"curve{suffix}")
    draw(
        [Group(group.row, {"mode": str(group.options)}, group.seeds) for group in compared],
        tmp_path / f"columns{suffix}",
    )
    starts = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    for name in ("curve", "columns"):
        assert (tmp_path / f"{name}{suffix}").read_bytes().startswith(starts[suffix])


def test_the_command_writes_new_files_only(mlo, finished):
    for seed in range(3):
        finished(f"runs/{seed}", seed, {"r": {"error": seed, "loss": 2 * seed}, "s": {"error": 5, "loss": 5}})
    code, out, _ = mlo(
        "compare", "runs", "--measure", "loss", "--output", "table.md", "--format", "markdown", "--plot", "p.png"
    )
    assert (code, out) == (0, "written: table.md\nwritten: p.png\n")
    assert "loss: difference" in Path("table.md").read_text()
    code, out, err = mlo("compare", "runs", "--format", "csv", "--plot", "alone.png")
    assert (code, out) == (0, table(groups(load([Path("runs")])), form="csv"))
    assert err == "written: alone.png\n"
    before = Path("table.md").read_text()
    for words in (["--output", "table.md"], ["--plot", "p.png"]):
        code, _, err = mlo("compare", "runs", *words)
        assert code == 2
        assert "already exists and is not overwritten" in err
    assert Path("table.md").read_text() == before
    assert "error: difference" in mlo("compare", "runs")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--measure", "eror"], "did you mean error?"),
        (["--baseline", "t"], "--baseline: 't' is not a label of these runs; the labels are: r; s"),
        (["--format", "html"], "'html' is not known among the formats; there are: text, markdown, latex, csv"),
        (
            ["--baseline", "r", "--format", "csv"],
            "--baseline: csv has no differences, only each run's numbers; use text",
        ),
        (
            ["--measure", "error", "--format", "csv"],
            "--measure: csv has no differences, only each run's numbers; use text",
        ),
        (["--plot", "p.gif"], "p.gif: unknown kind of picture; use a name that ends in .png, .svg, .pdf"),
        (["--output", "no/such/table.md"], "error: no/such/table.md: cannot be written (No such file or directory)"),
    ],
)
def test_wrong_options_of_a_comparison_are_errors(mlo, finished, words, message):
    finished("runs/a", 0, {"r": {"error": 1}, "s": {"error": 2}})
    code, _, err = mlo("compare", "runs", *words)
    assert code == 2
    assert message in err
