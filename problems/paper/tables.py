"""`mlo reproduce table2 ... table6`: the paper's tables, each with the runs that it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from matplotlib.figure import Figure

from mlo.sweeps.experiment import Wanted
from problems.paper import published
from problems.paper.experiment import FULL, NOTATION, SHRUNK, SPREAD, PaperExperiment
from problems.paper.pages import DIFFERENCES, Comparison, Seeds, comparison_table, result_table, seeds_table, verdict
from problems.paper.published import Row
from problems.paper.settings import Setting, imagenet_evaluation, together

REPORTED = "The columns on the right are the numbers in the paper."
REPEATED = "In the paper, the last row has the number of RN50 in Table 3 (2.61); RN18 has 2.65 there."


def every_method(table: str, data: str) -> str:
    """What Tables 2 and 3 are for."""
    return (
        f"This page reproduces Table {table} of the Learning by Teaching (LBT) paper: the test error, on {data}, of "
        f"architectures found with and without a student. {NOTATION} DARTS-1st is DARTS of first order, and P-DARTS "
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
        """Each row with a student against the one without, in the same space."""
        plain = {row.run: row.label for row in self.rows if row.run.student is None}
        pairs = ((row, plain.get(row.run._replace(student=None))) for row in self.rows if row.run.student)
        return [Comparison(row.label, baseline) for row, baseline in pairs if baseline]

    def against_random(self, scale: str) -> list[Comparison]:
        """Each row whose networks are trained as the random one's against the random architecture."""
        (random,) = (row for row in self.rows if row.label == "random")
        training = random.run.options(scale)["evaluation"]
        alike = [row for row in self.rows if row.run.options(scale)["evaluation"] == training]
        return [Comparison(row.label, random.label) for row in alike if row is not random]

    def sections(self, scale: str, found: Mapping[str, Seeds]) -> tuple[list[str], dict[str, Figure]]:
        """The table, the tests, the seeds."""
        by_label = {row.label: found[self.key(row)] for row in self.rows}
        pairs = self.comparisons()
        told = [SHRUNK + self.laptop_data if scale == "laptop" else FULL]
        told += [" ".join(filter(None, [SPREAD, REPORTED, self.note]))]
        told += [result_table(self.rows, by_label, scale), DIFFERENCES]
        told += [comparison_table(pairs, by_label), verdict(pairs, by_label)]
        if "random" in by_label:
            told += [
                "Against a random architecture of the same space:",
                comparison_table(self.against_random(scale), by_label),
            ]
        return [*told, "Each seed:", seeds_table(list(by_label), by_label)], {}

    def key(self, row: Row) -> str:
        """The run that a row shows."""
        return row.run.key


class Table2(_Table):
    """Table 2: every method with and without a student, on CIFAR-100."""

    name, title, rows = "table2", "Table 2: CIFAR-100", published.TABLE2
    about = every_method("2", "CIFAR-100")


class Table3(_Table):
    """Table 3: every method with and without a student, on CIFAR-10."""

    name, title, rows = "table3", "Table 3: CIFAR-10", published.TABLE3
    about = every_method("3", "CIFAR-10")


class Table4(_Table):
    """Table 4: architectures searched on CIFAR or ImageNet, evaluated on ImageNet."""

    name, title, rows = "table4", "Table 4: ImageNet", published.TABLE4
    about = (
        "This page reproduces Table 4 of the Learning by Teaching (LBT) paper: architectures searched on CIFAR or on "
        f"ImageNet, trained and tested on ImageNet. {NOTATION} The last name in brackets is the data of the search."
    )
    laptop_data = "\n- ImageNet: CIFAR-10 at 24x24 replaces it, and the networks are trained on 2,000 of its images."
    note = "The search on CIFAR and its cost are those of Tables 2 and 3."

    def runs(self, scale: str) -> Mapping[str, Wanted]:
        """The searches on CIFAR, then the evaluations of what they found; the searches on ImageNet itself."""
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
        """An evaluation is named by its search too, for two searches of one space are evaluated alike."""
        return row.run.key if row.searched is None else f"{row.searched.key}-on-{row.run.data}"

    def comparisons(self) -> list[Comparison]:
        """Each row with a student against the row before it, which is the same without."""
        return [
            Comparison(row.label, before.label)
            for before, row in zip(self.rows, self.rows[1:], strict=False)
            if row.run.student
        ]

    def sections(self, scale: str, found: Mapping[str, Seeds]) -> tuple[list[str], dict[str, Figure]]:
        """As for every table; the cost of a search is taken from its run."""
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
    """The options of an `evaluate` job on the data of a run."""
    options = run.options(scale)
    training = dict(imagenet_evaluation(scale, run.space))
    own = {"threads": options.get("threads", 1), "data": options["data"], "steps": training.pop("steps")}
    return together({**own, "training": training})


class _Ablation(_Table):
    def comparisons(self) -> list[Comparison]:
        """The full method, the second of each two rows, against the ablated one before it."""
        return [Comparison(full.label, less.label) for less, full in zip(self.rows[::2], self.rows[1::2], strict=True)]


class Table5(_Ablation):
    """Table 5: judged by the student alone, or by the teacher too (first ablation)."""

    name, title, rows = "table5", "Table 5: whose validation loss judges", published.TABLE5
    about = (
        "This page reproduces Table 5 of the Learning by Teaching (LBT) paper, its first ablation: is the "
        "architecture judged by the student's validation loss alone, or by the teacher's too? All rows are LBT(RN18, "
        "DARTS-2nd): the student is a ResNet-18, the search that of second-order DARTS."
    )
    note = REPEATED


class Table6(_Ablation):
    """Table 6: the student learns from pseudo-labels alone, or from labels too (second ablation)."""

    name, title, rows = "table6", "Table 6: what the student learns from", published.TABLE6
    about = (
        "This page reproduces Table 6 of the Learning by Teaching (LBT) paper, its second ablation: does the student "
        "learn from the teacher's pseudo-labels alone, or from human labels too? All rows are LBT(RN18, DARTS-2nd): "
        "the student is a ResNet-18, the search that of second-order DARTS."
    )
    note = REPEATED
