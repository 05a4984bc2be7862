"""The numbers that the paper reports: the rows of Tables 2 to 6 that are reproduced here, in the paper's order."""

from __future__ import annotations

from typing import NamedTuple

from problems.paper.settings import DataSet, Setting


class Reported(NamedTuple):
    """The numbers of one row, None where the paper gives none.

    Attributes:
        error: test error in percent.
        deviation: standard deviation of the error over runs.
        parameters: in millions.
        cost: of the search, in GPU-days.
        top5_error: in percent, on ImageNet.
    """

    error: float
    deviation: float | None = None
    parameters: float | None = None
    cost: float | None = None
    top5_error: float | None = None


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        label: as in the paper.
        run: the run whose results the row shows.
        reported: the numbers of the paper, or None.
        searched: the search that found the architecture, if `run` is only its evaluation.
    """

    label: str
    run: Setting
    reported: Reported | None
    searched: Setting | None = None


_SPACES = {"darts1": "DARTS-1st", "darts2": "DARTS-2nd", "pdarts": "P-DARTS", "pcdarts": "PC-DARTS"}


def _searches(data: DataSet, reported: dict[str, tuple[Reported, Reported, Reported]]) -> tuple[Row, ...]:
    """Three rows for each space (without and with each student), and random architectures as baselines."""
    rows = []
    for space, numbers in reported.items():
        for student, number in zip((None, "rn18", "rn50"), numbers, strict=True):
            label = f"LBT({student.upper()}, {_SPACES[space]})" if student else _SPACES[space]
            rows.append(Row(label, Setting(data, space, student), number))
    for label, method in (("random", "random"), ("best of 4 random", "best_of_random")):
        rows.append(Row(label, Setting(data, method=method), None))
    return tuple(rows)


TABLE2 = _searches(
    "cifar100",
    {
        "darts1": (Reported(20.52, 0.31, 1.8, 0.4), Reported(19.28, 0.13, 1.9, 0.5), Reported(18.74, 0.09, 1.9, 0.6)),
        "darts2": (Reported(20.58, 0.44, 1.8, 1.5), Reported(17.93, 0.18, 2.0, 1.9), Reported(17.06, 0.22, 2.1, 2.2)),
        "pdarts": (Reported(17.49, None, 3.6, 0.3), Reported(16.53, 0.16, 3.6, 0.5), Reported(16.29, 0.07, 3.7, 0.6)),
        "pcdarts": (Reported(17.96, 0.15, 3.9, 0.1), Reported(17.21, 0.13, 3.8, 0.1), Reported(16.88, 0.09, 3.8, 0.2)),
    },
)

TABLE3 = _searches(
    "cifar10",
    {
        "darts1": (Reported(3.00, 0.14, 3.3, 0.4), Reported(2.87, 0.05, 3.2, 0.6), Reported(2.79, 0.07, 3.3, 0.7)),
        "darts2": (Reported(2.76, 0.09, 3.3, 1.5), Reported(2.65, 0.03, 3.4, 1.9), Reported(2.61, 0.05, 3.4, 2.1)),
        "pdarts": (Reported(2.50, None, 3.4, 0.3), Reported(2.64, 0.11, 3.4, 0.4), Reported(2.57, 0.15, 3.4, 0.5)),
        "pcdarts": (Reported(2.57, 0.07, 3.6, 0.1), Reported(2.59, 0.03, 3.7, 0.1), Reported(2.56, 0.04, 3.7, 0.2)),
    },
)


def _transfer(label: str, searched: Setting, reported: Reported) -> Row:
    return Row(label, Setting("imagenet", searched.space, searched.student), reported, searched)


TABLE4 = (
    _transfer("DARTS-2nd(CIFAR10)", Setting("cifar10", "darts2"), Reported(26.7, None, 4.7, 1.5, 8.7)),
    _transfer(
        "LBT(RN50, DARTS-2nd, CIFAR10)", Setting("cifar10", "darts2", "rn50"), Reported(25.5, None, 4.8, 2.1, 7.9)
    ),
    _transfer("P-DARTS(CIFAR10)", Setting("cifar10", "pdarts"), Reported(24.4, None, 4.9, 0.3, 7.4)),
    _transfer("LBT(RN50, P-DARTS, CIFAR10)", Setting("cifar10", "pdarts", "rn50"), Reported(24.1, None, 4.9, 0.5, 7.2)),
    _transfer("P-DARTS(CIFAR100)", Setting("cifar100", "pdarts"), Reported(24.7, None, 5.1, 0.3, 7.5)),
    _transfer(
        "LBT(RN50, P-DARTS, CIFAR100)", Setting("cifar100", "pdarts", "rn50"), Reported(24.2, None, 5.3, 0.6, 7.1)
    ),
    Row("PC-DARTS(ImageNet)", Setting("imagenet", "pcdarts"), Reported(24.2, None, 5.3, 3.8, 7.3)),
    Row("LBT(RN50, PC-DARTS, ImageNet)", Setting("imagenet", "pcdarts", "rn50"), Reported(23.5, None, 5.4, 4.1, 6.8)),
)

_LBT100, _LBT10 = Setting("cifar100", "darts2", "rn18"), Setting("cifar10", "darts2", "rn18")

TABLE5 = (
    Row("Student only (CIFAR-100)", _LBT100._replace(judged_by="student"), Reported(20.27, 0.24)),
    Row("Student + teacher (CIFAR-100)", _LBT100, Reported(17.93, 0.18)),
    Row("Student only (CIFAR-10)", _LBT10._replace(judged_by="student"), Reported(3.01, 0.08)),
    Row("Student + teacher (CIFAR-10)", _LBT10, Reported(2.61, 0.05)),
)

TABLE6 = (
    Row("Pseudo labels only (CIFAR-100)", _LBT100._replace(student_learns_from="pseudo_labels"), Reported(19.82, 0.31)),
    Row("Pseudo labels + human labels (CIFAR-100)", _LBT100, Reported(17.93, 0.18)),
    Row("Pseudo labels only (CIFAR-10)", _LBT10._replace(student_learns_from="pseudo_labels"), Reported(2.93, 0.07)),
    Row("Pseudo labels + human labels (CIFAR-10)", _LBT10, Reported(2.61, 0.05)),
)

TRADE_OFFS = (0.1, 1.0, 10.0)
"""The values of the trade-offs that are run. The paper's figures show curves without numbers."""
