"""What the paper's tables and figures have in common as experiments: seeds, words on the scale, a page."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from matplotlib.figure import Figure

from mlo import Experiment
from mlo.files import write_atomic
from problems.paper.pages import Seeds

SHRUNK = (
    "This is the laptop scale: images of 12x12, 1,000 training, 1,000 validation and 4,000 unlabeled ones, supernets "
    "of 4 channels and 3 cells searched for 50 rounds (P-DARTS: 3, 4 and 5 cells, 25 rounds each), networks of 8 "
    "channels and 3 cells trained for 300 steps on the 2,000 labeled images and tested on 5,000. The students are "
    "small convolutional networks: of 24,000 weights where the paper has ResNet-18 (RN18), and a wider one where it "
    "has ResNet-50 (RN50). Fashion-MNIST stands in for CIFAR-100, and held-out images of the same set for the "
    "unlabeled ones of the other CIFAR. "
)
FULL = "This is the paper's scale. "


class PaperExperiment(Experiment):
    """What the tables and figures have in common: ten seeds as in the paper, five on a laptop."""

    scales: ClassVar[Mapping[str, int]] = {"laptop": 5, "paper": 10}
    name: ClassVar[str]
    title: ClassVar[str]

    def write(self, scale: str, results: Mapping[str, Mapping[int, Mapping[str, Any]]], folder: Path) -> list[Path]:
        """Write the page, and what pictures it has, into the folder."""
        found = {key: {seed: _only(rows) for seed, rows in seeds.items()} for key, seeds in results.items()}
        sections, pictures = self.sections(scale, found)
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
    def sections(self, scale: str, found: Mapping[str, Seeds]) -> tuple[list[str], dict[str, Figure]]:
        """The paragraphs and tables of the page, and pictures by file name."""


def _only(rows: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """What is told of the one method of a run."""
    (measures,) = rows.values()
    return measures
