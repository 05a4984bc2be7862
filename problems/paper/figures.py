"""`mlo reproduce figure3`, `figure4` and `benefit`: the trade-offs, and a setting in which teaching should help."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from matplotlib.figure import Figure

from mlo import Wanted
from problems.paper.experiment import NOTATION, SPREAD, PaperExperiment, scale_note
from problems.paper.pages import (
    DIFFERENCES,
    Comparison,
    Seeds,
    column,
    comparison_table,
    markdown,
    seeds_table,
    spread,
    verdict,
)
from problems.paper.reported_results import TRADE_OFFS
from problems.paper.settings import Options, Setting, benefit_options


class _TradeOff(PaperExperiment):
    option: ClassVar[str]
    symbol: ClassVar[str]

    def _run(self, data: Any, value: float) -> Setting:
        options: dict[str, Any] = {self.option: value}
        return Setting(data, "darts2", "rn18", held_out=True, **options)

    def runs(self, scale: str) -> Mapping[str, Wanted]:
        """One run for each value of the option, on each data set."""
        every = [self._run(data, value) for data in ("cifar100", "cifar10") for value in TRADE_OFFS]
        return {run.key: Wanted("lbt", run.options(scale)) for run in every}

    def sections(self, scale: str, found: Mapping[str, Seeds]) -> tuple[list[str], dict[str, Figure]]:
        """The curve for each data set, as a picture and as numbers."""
        figure = Figure(figsize=(8.4, 3.4), layout="constrained")
        parts = [
            scale_note(scale),
            f"{SPREAD} The error is that on 5,000 labeled images that neither search nor training used. {NOTATION}",
            DIFFERENCES,
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
            parts += [f"## {title}", markdown(body, ["", "error, %"]), comparison_table(pairs, labels)]
            parts += ["Each seed:", seeds_table(list(labels), labels)]
        return parts, {f"{self.name}.png": figure}


class Figure3(_TradeOff):
    """Figure 3: the error against lambda, the weight of the pseudo-labels."""

    name, title, option, symbol = "figure3", "Figure 3: the weight of the pseudo-labels", "pseudo_weight", "λ"
    about = (
        "This page reproduces Figure 3 of the Learning by Teaching paper: the test error of LBT(RN18, DARTS-2nd) "
        "against λ, the weight of the pseudo-labels in the student's loss, with γ = 1. In the paper, λ = 1 has the "
        "lowest error on both data sets."
    )


class Figure4(_TradeOff):
    """Figure 4: the error against gamma, the weight of the student's validation loss."""

    name, title, option, symbol = "figure4", "Figure 4: the weight of the student", "student_weight", "γ"
    about = (
        "This page reproduces Figure 4 of the Learning by Teaching paper: the test error of LBT(RN18, DARTS-2nd) "
        "against γ, the weight of the student's validation loss in the architecture's loss, with λ = 1. In the "
        "paper, γ = 1 has the lowest error on both data sets."
    )


SETTING = """The setting:

- Data: CIFAR-10 at 12x12. The search sees 100 training and 100 validation images with labels, and 8,000 without.
- Search: 100 rounds. The architecture's gradient leads through one training step of each network, with exact second
  derivatives. Four operations compete on each edge: 3x3 max pooling, the identity, 3x3 separable convolution, and
  noise. Noise replaces its input by normal noise (as in space S4 of Zela et al. 2020), so it is of no use.
- Test: each network is trained for 300 steps on all 50,000 training images with their labels, and tested on 5,000 test
  images. Differences in error therefore come from the architecture.
- All methods use the same seeds, and so the same images."""


class Benefit(PaperExperiment):
    """Our own setting in which teaching should help: few labels, a useless operation, 10 paired seeds."""

    scales: ClassVar[Mapping[str, int]] = {"laptop": 10}
    name, title = "benefit", "Where teaching should help"
    about = (
        "This experiment is ours, not the paper's. It is built so that teaching should help if it helps anywhere: "
        "the search has few labels but many unlabeled images, and one of the operations is harmful. The question is "
        "whether Learning by Teaching (LBT) then finds better architectures than the same search without a student "
        "(DARTS-2nd), and avoids the harmful operation."
    )
    labels: ClassVar[Mapping[str, tuple[str, Options]]] = {
        "random": ("benefit-random", benefit_options("random")),
        "best of 4 random": ("benefit-best_of_random", benefit_options("best_of_random")),
        "DARTS-2nd": ("benefit-plain", benefit_options("plain")),
        "LBT, γ = 1": ("benefit-lbt-gamma-1", benefit_options("lbt")),
        "LBT, γ = 20": ("benefit-lbt-gamma-20", benefit_options("lbt", 20.0)),
        "LBT, student alone": ("benefit-lbt-student-alone", benefit_options("lbt", judged_by="student")),
    }

    def runs(self, scale: str) -> Mapping[str, Wanted]:
        """One run for each label."""
        return {key: Wanted("lbt", options) for key, options in self.labels.values()}

    def sections(self, scale: str, found: Mapping[str, Seeds]) -> tuple[list[str], dict[str, Figure]]:
        """The setting, the results and the tests."""
        by_label = {label: found[key] for label, (key, _) in self.labels.items()}
        measures = {
            "noise": "noise edges of 16",
            "skip_connect": "skip-connections of 8 normal edges",
            "student_part": "student's part",
        }
        body = []
        for label, seeds in by_label.items():
            others = [column(seeds, measure) for measure in measures]
            error = spread(column(seeds, "test_error"))
            body.append([label, error, *(spread(values, 3) if values else "-" for values in others)])
        lbt = [label for label in by_label if label.startswith("LBT")]
        pairs = [Comparison(label, "DARTS-2nd") for label in lbt]
        pairs_random = [Comparison(label, "random") for label in by_label if label != "random"]
        parts = [
            SETTING,
            f"{SPREAD} The student's part is the norm of the student's part of the architecture's gradient, divided by "
            "that of the teacher's part, at the end of the search with its initial learning rates. \"LBT, student "
            "alone\" leaves the teacher's part out, as if γ were infinite.",
            markdown(body, ["found by", "error, %", *measures.values()]),
            DIFFERENCES,
            comparison_table(pairs, by_label),
            verdict(pairs, by_label),
            "Against a random architecture of the same space:",
            comparison_table(pairs_random, by_label),
            "Each seed:",
            seeds_table(list(by_label), by_label),
        ]
        return parts, {}
