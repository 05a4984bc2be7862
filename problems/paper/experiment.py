"""The base class of the paper's tables and figures as experiments: seeds, a note on the scale, a page."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from matplotlib.figure import Figure

from mlo import Experiment
from mlo.files import write_atomic
from problems.paper.pages import Seeds

LAPTOP_NOTE = """These are results at the laptop scale, which is much smaller than the paper's:

- Data: images of 12x12, of which 1,000 are for training, 1,000 for validation and 4,000 without labels. Fashion-MNIST
  replaces CIFAR-100. The unlabeled images are from the same data set, not from the other CIFAR.
- Search: supernets of 4 channels and 3 cells, for 50 rounds (P-DARTS: 3, 4 and 5 cells, for 25 rounds each).
- Test: networks of 8 channels and 3 cells, trained for 300 steps on the 2,000 labeled images and tested on 5,000.
- Students: a convolutional network of 24,000 weights replaces ResNet-18 (RN18), and a wider one ResNet-50 (RN50)."""
PAPER_NOTE = "These are results at the paper's scale."
NOTATION = (
    "LBT(RN18, DARTS-2nd) is Learning by Teaching with a ResNet-18 as the student and the search of second-order "
    "DARTS; DARTS-2nd is that search without a student."
)
SPREAD = "Numbers are mean ± standard deviation over seeds."


def scale_note(scale: str) -> str:
    """Describe a scale, "laptop" or "paper", at the top of a page."""
    return LAPTOP_NOTE if scale == "laptop" else PAPER_NOTE


class PaperExperiment(Experiment):
    """A table or figure of the paper, with ten seeds as in the paper, or five at the laptop scale."""

    scales: ClassVar[Mapping[str, int]] = {"laptop": 5, "paper": 10}
    name: ClassVar[str]
    title: ClassVar[str]
    about: ClassVar[str]

    def write(self, scale: str, results: Mapping[str, Mapping[int, Mapping[str, Any]]], folder: Path) -> list[Path]:
        """Write the page and its pictures into the folder, and return their paths."""
        found = {key: {seed: _only(rows) for seed, rows in seeds.items()} for key, seeds in results.items()}
        sections, pictures = self.sections(scale, found)
        command = f"mlo reproduce {self.name} --scale {scale}"
        parts = ["# " + self.title, self.about, *sections, f"This command makes the page:\n\n```sh\n{command}\n```"]
        page = folder / f"{self.name}.md"
        write_atomic(page, "\n\n".join(parts) + "\n")
        paths = [page]
        for picture, figure in pictures.items():
            paths.append(folder / picture)
            figure.savefig(paths[-1], dpi=150)
        return paths

    @abstractmethod
    def sections(self, scale: str, found: Mapping[str, Seeds]) -> tuple[list[str], dict[str, Figure]]:
        """Return the paragraphs and tables of the page, and its pictures by file name.

        Args:
            scale: "laptop" or "paper".
            found: {key of a run: {seed: measures}}.
        """


def _only(rows: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The measures of the only method of a run."""
    (measures,) = rows.values()
    return measures
