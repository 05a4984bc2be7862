"""`mlo reproduce table2 ... figure4`: the paper's tables and figures, each with the runs that it takes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from matplotlib.figure import Figure

from mlo.experiment import Experiment, Wanted
from mlo.files import write_atomic
from problems.paper import published
from problems.paper.pages import (
    Comparison,
    Seeds,
    column,
    comparison_table,
    markdown,
    result_table,
    seeds_table,
    spread,
    verdict,
)
from problems.paper.published import TRADE_OFFS, Row
from problems.paper.settings import BALANCED, Run, Scale, benefit_options, imagenet_evaluation, together

SHRUNK = (
    "This is the laptop scale: images of 12x12, 1,000 training, 1,000 validation and 4,000 unlabeled ones, supernets "
    "of 4 channels and 3 cells searched for 50 rounds (P-DARTS: 2, 3 and 4 cells, 25 rounds each), networks of 8 "
    "channels and 3 cells trained for 300 steps on the 2,000 labeled images and tested on 5,000. The students are "
    "small convolutional networks: of 24,000 weights where the paper has ResNet-18 (RN18), and a wider one where it "
    "has ResNet-50 (RN50). Fashion-MNIST stands in for CIFAR-100, and held-out images of the same set for the "
    "unlabeled ones of the other CIFAR. "
)
FULL = "This is the paper's scale. "


class _PaperExperiment(Experiment):
    """What the tables and figures have in common: ten seeds as in the paper, five on a laptop."""

    scales: ClassVar[Mapping[str, int]] = {"laptop": 5, "paper": 10}
    name: ClassVar[str]
    title: ClassVar[str]

    def write(self, scale: str, results: Mapping[str, Mapping[int, Mapping[str, Any]]], folder: Path) -> list[Path]:
        """Write the page, and what pictures it has, into the folder."""
        found = {key: {seed: _only(rows) for seed, rows in seeds.items()} for key, seeds in results.items()}
        assert scale in ("laptop", "paper")
        sections, pictures = self.sections("laptop" if scale == "laptop" else "paper", found)
        command = f"mlo reproduce {self.name} --scale {scale}"
        told = ["# " + self.title, *sections, f"The command that makes it:\n\n```sh\n{command}\n```"]
        page = folder / f"{self.name}.md"
        write_atomic(page, "\n\n".join(told) + "\n")
        paths = [page]
        for picture, figure in pictures.items():
            paths.append(folder / picture)
            figure.savefig(paths[-1], dpi=150)
        return paths

    @abstractmethod
    def sections(self, scale: Scale, found: Mapping[str, Seeds]) -> tuple[list[str], dict[str, Figure]]:
        """The paragraphs and tables of the page, and pictures by file name."""


def _only(rows: Mapping[str, Any]) -> Mapping[str, Any]:
    (measures,) = rows.values()
    return measures  # type: ignore[no-any-return]


class _Table(_PaperExperiment):
    rows: ClassVar[Sequence[Row]]
    note: ClassVar[str] = ""

    def runs(self, scale: str) -> Mapping[str, Wanted]:
        """The run of each row."""
        return {row.run.key: Wanted("lbt", row.run.options(_scale(scale))) for row in self.rows}

    def comparisons(self) -> list[Comparison]:
        """Each row with a student against the one without, in the same space."""
        plain = {row.run: row.label for row in self.rows if row.run.student is None}
        pairs = ((row, plain.get(row.run._replace(student=None))) for row in self.rows if row.run.student)
        return [Comparison(row.label, baseline) for row, baseline in pairs if baseline]

    def against_random(self) -> list[Comparison]:
        """Each row against the random architecture."""
        return [Comparison(r.label, "random") for r in self.rows if r.label != "random"]

    def sections(self, scale: Scale, found: Mapping[str, Seeds]) -> tuple[list[str], dict[str, Figure]]:
        """The table, the tests, the seeds."""
        by_label = {row.label: found[self.key(row)] for row in self.rows}
        pairs = self.comparisons()
        told = [(SHRUNK if scale == "laptop" else FULL) + self.note, result_table(self.rows, by_label, scale)]
        told += [verdict(pairs, by_label), comparison_table(pairs, by_label)]
        if "random" in by_label:
            told += [
                "Against a random architecture of the same space:",
                comparison_table(self.against_random(), by_label),
            ]
        return [*told, "Each seed:", seeds_table(list(by_label), by_label)], {}

    def key(self, row: Row) -> str:
        """The run that a row shows."""
        return row.run.key


class Table2(_Table):
    """Table 2: every method with and without a student, on CIFAR-100."""

    name, title, rows = "table2", "Table 2: CIFAR-100", published.TABLE2


class Table3(_Table):
    """Table 3: every method with and without a student, on CIFAR-10."""

    name, title, rows = "table3", "Table 3: CIFAR-10", published.TABLE3


class Table4(_Table):
    """Table 4: architectures searched on CIFAR or ImageNet, evaluated on ImageNet."""

    name, title, rows = "table4", "Table 4: ImageNet", published.TABLE4
    note = (
        "CIFAR-10 at 24x24 stands in for ImageNet at the laptop scale, and the networks are trained on 2,000 "
        "of its images. The cost is that of the search, which Tables 2 and 3 share."
    )

    def runs(self, scale: str) -> Mapping[str, Wanted]:
        """The searches on CIFAR, then the evaluations of what they found; the searches on ImageNet itself."""
        wanted = {}
        for row in self.rows:
            if row.searched is None:
                wanted[row.run.key] = Wanted("lbt", row.run.options(_scale(scale)))
                continue
            wanted[row.searched.key] = Wanted("lbt", row.searched.options(_scale(scale)))
            uses = {"genotype": (row.searched.key, "genotype.json")}
            wanted[self.key(row)] = Wanted("evaluate", transfer_options(row.run, _scale(scale)), uses)
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

    def sections(self, scale: Scale, found: Mapping[str, Seeds]) -> tuple[list[str], dict[str, Figure]]:
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


def transfer_options(run: Run, scale: Scale) -> Mapping[str, Any]:
    """The options of an `evaluate` job on the data of a run."""
    options = run.options(scale)
    training = dict(imagenet_evaluation(scale, run.space))
    return together({"data": options["data"], "steps": training.pop("steps"), "training": training})


class _Ablation(_Table):
    def comparisons(self) -> list[Comparison]:
        """The full method, the second of each two rows, against the ablated one before it."""
        return [Comparison(full.label, less.label) for less, full in zip(self.rows[::2], self.rows[1::2], strict=True)]


class Table5(_Ablation):
    """Table 5: judged by the student alone, or by the teacher too (first ablation)."""

    name, title, rows = "table5", "Table 5: whose validation loss judges", published.TABLE5
    note = "In the paper, the last row repeats the number of RN50 in Table 3 (2.61), where RN18 has 2.65."


class Table6(_Ablation):
    """Table 6: the student learns from pseudo-labels alone, or from labels too (second ablation)."""

    name, title, rows = "table6", "Table 6: what the student learns from", published.TABLE6


class _TradeOff(_PaperExperiment):
    option: ClassVar[str]
    symbol: ClassVar[str]

    def _run(self, data: Any, value: float) -> Run:
        options: dict[str, Any] = {self.option: value}
        return Run(data, "darts2", "rn18", held_out=True, **options)

    def runs(self, scale: str) -> Mapping[str, Wanted]:
        """A run for each value on each data set."""
        every = [self._run(data, value) for data in ("cifar100", "cifar10") for value in TRADE_OFFS]
        return {run.key: Wanted("lbt", run.options(_scale(scale))) for run in every}

    def sections(self, scale: Scale, found: Mapping[str, Seeds]) -> tuple[list[str], dict[str, Figure]]:
        """The curve of each data set, as a picture and as numbers."""
        figure = Figure(figsize=(8.4, 3.4), layout="constrained")
        told = [
            (SHRUNK if scale == "laptop" else FULL)
            + f"LBT(RN18, DARTS-2nd), the other trade-off at 1. The error is that on 5,000 labeled images held out of "
            f"search and training. The paper's figure has its least error at {self.symbol} = 1 on both.",
            f"![error against {self.symbol}]({self.name}.png)",
        ]
        titles = {"cifar100": "CIFAR-100", "cifar10": "CIFAR-10"}
        if scale == "laptop":
            titles["cifar100"] = "Fashion-MNIST"
        for axes, (data, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
            by_value = {value: found[self._run(data, value).key] for value in TRADE_OFFS}
            errors = [column(seeds, "test_error") for seeds in by_value.values()]
            means = [sum(each) / len(each) for each in errors]
            for value, each in zip(TRADE_OFFS, errors, strict=True):
                axes.plot([value] * len(each), each, ".", color="0.7")
            axes.plot(TRADE_OFFS, means, "o-")
            axes.set(xlabel=self.symbol, ylabel="test error, %", title=title, xscale="log", xticks=TRADE_OFFS)
            axes.set_xticks(TRADE_OFFS, [f"{value:g}" for value in TRADE_OFFS], minor=False)
            axes.spines[["top", "right"]].set_visible(False)
            labels = {f"{self.symbol} = {value:g}": seeds for value, seeds in by_value.items()}
            one = f"{self.symbol} = 1"
            pairs = [Comparison(label, one) for label in labels if label != one]
            body = [[label, spread(column(seeds, "test_error"))] for label, seeds in labels.items()]
            told += [f"## {title}", markdown(body, ["", "error, %"]), comparison_table(pairs, labels)]
            told += [seeds_table(list(labels), labels)]
        return told, {f"{self.name}.png": figure}


class Figure3(_TradeOff):
    """Figure 3: the error against lambda, the weight of the pseudo-labels."""

    name, title, option, symbol = "figure3", "Figure 3: the weight of the pseudo-labels", "pseudo_weight", "λ"


class Figure4(_TradeOff):
    """Figure 4: the error against gamma, the weight of the student's validation loss."""

    name, title, option, symbol = "figure4", "Figure 4: the weight of the student", "student_weight", "γ"


class Benefit(_PaperExperiment):
    """A setting of ours in which a benefit of teaching should show: few labels, a bad operation, 10 paired seeds."""

    scales: ClassVar[Mapping[str, int]] = {"laptop": 10}
    name, title = "benefit", "Where a benefit of teaching should show"
    labels: ClassVar[Mapping[str, tuple[str, float]]] = {
        "random": ("random", 1.0),
        "best of 4 random": ("best_of_random", 1.0),
        "DARTS-2nd": ("plain", 1.0),
        "LBT, γ = 1": ("lbt", 1.0),
        f"LBT, γ = {BALANCED:g}": ("lbt", BALANCED),
    }

    def runs(self, scale: str) -> Mapping[str, Wanted]:
        """A run for each label."""
        return {self._key(*chosen): Wanted("lbt", benefit_options(*chosen)) for chosen in self.labels.values()}

    def _key(self, method: str, weight: float) -> str:
        return f"benefit-{method}" + (f"-gamma-{weight:g}" if method == "lbt" else "")

    def sections(self, scale: Scale, found: Mapping[str, Seeds]) -> tuple[list[str], dict[str, Figure]]:
        """What was searched, what came out, and the tests."""
        by_label = {label: found[self._key(*chosen)] for label, chosen in self.labels.items()}
        measures = {
            "noise": "noise edges of 8",
            "skip_connect": "skip-connections of 8",
            "student_part": "student's part",
        }
        body = []
        for label, seeds in by_label.items():
            others = [column(seeds, measure) for measure in measures]
            error = spread(column(seeds, "test_error"))
            body.append([label, error, *(spread(values) if values else "-" for values in others)])
        lbt = [label for label in by_label if label.startswith("LBT")]
        pairs = [Comparison(label, "DARTS-2nd") for label in lbt]
        pairs_random = [Comparison(label, "random") for label in by_label if label != "random"]
        told = [
            "Real CIFAR-10, shrunk to 12x12. The search sees 100 training and 100 validation labels, and 8,000 "
            "unlabeled images; four operations compete on each edge: 3x3 max pooling, the identity, 3x3 separable "
            "convolution, and noise, which replaces its input by normal noise and is of no use (as in space S4 of Zela "
            "et al. 2020). 100 rounds, exact one-step hypergradients. Each network is then trained for 300 "
            "steps on all 50,000 training images with their labels, and tested on 5,000 of the test images, so "
            "that what tells the networks apart is the architecture. The same seeds, and so the same images, for all.",
            markdown(body, ["found by", "error, %", *measures.values()]),
            "\"Student's part\" is the norm of the student's part of the architecture's gradient over that of the "
            f"teacher's at the end of the search; γ = {BALANCED:g} makes the two alike.",
            verdict(pairs, by_label),
            comparison_table(pairs, by_label),
            "Against a random architecture of the same space:",
            comparison_table(pairs_random, by_label),
            "Each seed:",
            seeds_table(list(by_label), by_label),
        ]
        return told, {}


def _scale(name: str) -> Scale:
    return "laptop" if name == "laptop" else "paper"
