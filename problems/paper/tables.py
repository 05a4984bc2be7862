"""`mlo reproduce table2` to `table6`: the paper's tables and the runs that each needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from matplotlib.figure import Figure

from mlo import Wanted
from problems.paper import reported_results
from problems.paper.experiment import NOTATION, SPREAD, PaperExperiment, scale_note
from problems.paper.pages import DIFFERENCES, Comparison, Seeds, comparison_table, result_table, seeds_table, verdict
from problems.paper.reported_results import Row
from problems.paper.settings import Setting, imagenet_evaluation, merge_all

REPORTED = "The columns on the right are the numbers in the paper."
REPEATED = "In the paper, the last row has the number of RN50 in Table 3 (2.61); RN18 has 2.65 there."


def every_method(table: str, data: str) -> str:
    """Describe the page of Table 2 or 3."""
    return (
        f"This page reproduces Table {table} of the Learning by Teaching (LBT) paper: the test error, on {data}, of "
        f"architectures found with and without a student. {NOTATION} DARTS-1st is first-order DARTS, and P-DARTS "
        'and PC-DARTS are other searches. "Random" is an architecture drawn at random, and "best of 4 random" the '
        "one of four with the lowest validation error."
    )


class _Table(PaperExperiment):
    rows: ClassVar[Sequence[Row]]
    laptop_data: ClassVar[str] = ""
    note: ClassVar[str] = ""

    def runs(self, scale: str) -> Mapping[str, Wanted]:
        """The run of each row."""
        return {row.run.key: Wanted("lbt", row.run.options(scale)) for row in self.rows}

    def comparisons(self) -> list[Comparison]:
        """Compare each row with a student to the row without one in the same space."""
        plain = {row.run: row.label for row in self.rows if row.run.student is None}
        pairs = ((row, plain.get(row.run._replace(student=None))) for row in self.rows if row.run.student)
        return [Comparison(row.label, baseline) for row, baseline in pairs if baseline]

    def against_random(self, scale: str) -> list[Comparison]:
        """Compare each row to the random architecture, if its networks are trained in the same way."""
        (random,) = (row for row in self.rows if row.label == "random")
        training = random.run.options(scale)["evaluation"]
        same = [row for row in self.rows if row.run.options(scale)["evaluation"] == training]
        return [Comparison(row.label, random.label) for row in same if row is not random]

    def sections(self, scale: str, found: Mapping[str, Seeds]) -> tuple[list[str], dict[str, Figure]]:
        """The table, the paired tests, and the error of each seed."""
        by_label = {row.label: found[self.key(row)] for row in self.rows}
        pairs = self.comparisons()
        parts = [scale_note(scale) + (self.laptop_data if scale == "laptop" else "")]
        parts += [" ".join(filter(None, [SPREAD, REPORTED, self.note]))]
        parts += [result_table(self.rows, by_label, scale), DIFFERENCES]
        parts += [comparison_table(pairs, by_label), verdict(pairs, by_label)]
        if "random" in by_label:
            parts += [
                "Against a random architecture of the same space:",
                comparison_table(self.against_random(scale), by_label),
            ]
        return [*parts, "Each seed:", seeds_table(list(by_label), by_label)], {}

    def key(self, row: Row) -> str:
        """The key of the run whose results a row shows."""
        return row.run.key


class Table2(_Table):
    """Table 2: every method with and without a student, on CIFAR-100."""

    name, title, rows = "table2", "Table 2: CIFAR-100", reported_results.TABLE2
    about = every_method("2", "CIFAR-100")


class Table3(_Table):
    """Table 3: every method with and without a student, on CIFAR-10."""

    name, title, rows = "table3", "Table 3: CIFAR-10", reported_results.TABLE3
    about = every_method("3", "CIFAR-10")


class Table4(_Table):
    """Table 4: architectures searched on CIFAR or ImageNet, evaluated on ImageNet."""

    name, title, rows = "table4", "Table 4: ImageNet", reported_results.TABLE4
    about = (
        "This page reproduces Table 4 of the Learning by Teaching (LBT) paper: architectures searched on CIFAR or on "
        f"ImageNet, trained and tested on ImageNet. {NOTATION} The last name in brackets is the data of the search."
    )
    laptop_data = "\n- ImageNet: CIFAR-10 at 24x24 replaces it, and the networks are trained on 2,000 of its images."
    note = "The search on CIFAR and its cost are those of Tables 2 and 3."

    def runs(self, scale: str) -> Mapping[str, Wanted]:
        """The searches on CIFAR, the evaluations of the architectures they find, and the searches on ImageNet."""
        wanted = {}
        for row in self.rows:
            if row.searched is None:
                wanted[row.run.key] = Wanted("lbt", row.run.options(scale))
                continue
            wanted[row.searched.key] = Wanted("lbt", row.searched.options(scale))
            uses = {"genotype": (row.searched.key, "genotype.json")}
            wanted[self.key(row)] = Wanted("evaluate", transfer_options(row.run, scale), uses)
        return wanted

    def key(self, row: Row) -> str:
        """The key of an evaluation includes that of its search, since several searches share the same evaluation."""
        return row.run.key if row.searched is None else f"{row.searched.key}-on-{row.run.data}"

    def comparisons(self) -> list[Comparison]:
        """Compare each row with a student to the row before it, which is the same without a student."""
        return [
            Comparison(row.label, before.label)
            for before, row in zip(self.rows, self.rows[1:], strict=False)
            if row.run.student
        ]

    def sections(self, scale: str, found: Mapping[str, Seeds]) -> tuple[list[str], dict[str, Figure]]:
        """As for every table, with the cost of each search taken from the run that did it."""
        with_cost = dict(found)
        for row in self.rows:
            if row.searched is not None:
                key, searched = self.key(row), found[row.searched.key]
                with_cost[key] = {
                    seed: {**measures, "search_seconds": searched[seed]["search_seconds"]}
                    for seed, measures in found[key].items()
                }
        return super().sections(scale, with_cost)


def transfer_options(run: Setting, scale: str) -> Mapping[str, Any]:
    """The options of an `evaluate` job with the data of a run."""
    options = run.options(scale)
    training = dict(imagenet_evaluation(scale, run.space))
    common = {"threads": options.get("threads", 1), "data": options["data"], "steps": training.pop("steps")}
    return merge_all({**common, "training": training})


class _Ablation(_Table):
    def comparisons(self) -> list[Comparison]:
        """Compare the full method, the second of each pair of rows, to the ablated one before it."""
        return [Comparison(full.label, less.label) for less, full in zip(self.rows[::2], self.rows[1::2], strict=True)]


class Table5(_Ablation):
    """Table 5, the first ablation: only the student's validation loss, or the teacher's as well."""

    name, title, rows = "table5", "Table 5: which validation loss judges the architecture", reported_results.TABLE5
    about = (
        "This page reproduces Table 5 of the Learning by Teaching (LBT) paper, its first ablation: is the "
        "architecture judged by the student's validation loss alone, or by the teacher's too? All rows are LBT(RN18, "
        "DARTS-2nd): the student is a ResNet-18, and the search is that of second-order DARTS."
    )
    note = REPEATED


class Table6(_Ablation):
    """Table 6, the second ablation: the student learns only from pseudo-labels, or from labels as well."""

    name, title, rows = "table6", "Table 6: what the student learns from", reported_results.TABLE6
    about = (
        "This page reproduces Table 6 of the Learning by Teaching (LBT) paper, its second ablation: does the student "
        "learn from the teacher's pseudo-labels alone, or from human labels too? All rows are LBT(RN18, DARTS-2nd): "
        "the student is a ResNet-18, and the search is that of second-order DARTS."
    )
    note = REPEATED
