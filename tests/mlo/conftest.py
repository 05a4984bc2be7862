"""What several tests of mlo need: packages that are found like installed ones, one of them with a small job."""

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest

Register = Callable[[str, str, Mapping[str, Mapping[str, str]]], Path]


@pytest.fixture
def register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Register:
    """Lay down a distribution as pip would: its module's source, and its entry points {group: {name: target}}."""

    def lay(module: str, source: str, points: Mapping[str, Mapping[str, str]]) -> Path:
        site = tmp_path / f"site-{module}"
        info = site / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        lines = [f"[{group}]\n" + "".join(f"{n} = {t}\n" for n, t in names.items()) for group, names in points.items()]
        (info / "entry_points.txt").write_text("\n".join(lines))
        monkeypatch.syspath_prepend(site)
        monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)  # for the processes of a sweep
        monkeypatch.delitem(sys.modules, module, raising=False)
        return site

    return lay


RIDGE = '''
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

import mlo
from mlo.options.config import Config
from mlo.options.config import EstimatorOption
from mlo.hypergradient.estimators.implicit import Neumann
from mlo.runs.job import Job


class Strength(torch.nn.Module):
    def __init__(self, start):
        super().__init__()
        self.log = torch.nn.Parameter(torch.tensor(start).log())

    def forward(self):
        return self.log.exp()


class Fit(mlo.Problem):
    def loss(self, batch, ridge):
        x, y = batch
        return (self(x) - y).square().mean() + ridge() * sum(p.square().sum() for p in self.params.values())


class Validate(mlo.Problem):
    def loss(self, batch, fit):
        x, y = batch
        return (fit(x) - y).square().mean()


def batches():
    for _ in range(3):
        x = torch.randn(8, 4)
        yield x, x.sum(1, keepdim=True) + torch.randn(8, 1)


class Start(Config):
    ridge: float = Field(0.1, gt=0, description="the ridge at the start")
    dropout: float = 0.2


class RidgeJob(Job):
    """The strength of a ridge regression.

    Trained on the validation loss of what it regularizes.
    """

    steps: int = Field(12, description="rounds of the main stage")
    rate: float = Field(0.05, gt=0, description="learning rate of the regression")
    start: Start = Start()
    label: str = Field("plain", description="any text")
    tags: tuple[str, ...] = ()
    mode: Literal["on", "off"] = "on"
    where: Path | None = Path("here")
    hypergradient: EstimatorOption = Field(Neumann(terms=2), description="how to differentiate through the fit")

    def engine(self):
        fit = torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Dropout(self.start.dropout))
        ridge = Strength(self.start.ridge)
        return mlo.Engine(
            [
                Fit("fit", module=fit, optimizer=torch.optim.SGD(fit.parameters(), self.rate), data=batches),
                Validate("ridge", module=ridge, optimizer=torch.optim.Adam(ridge.parameters(), 0.01), data=batches),
            ],
            hypergradient=self.hypergradient,
            device=self.device,
        )
'''


@pytest.fixture
def ridge(register: Register) -> ModuleType:
    """A third party's package with a job named `ridge`."""
    register("ridge_package", RIDGE, {"mlo.problems": {"ridge": "ridge_package:RidgeJob"}})
    return importlib.import_module("ridge_package")


@pytest.fixture
def mlo(ridge, tmp_path, monkeypatch, command_line):
    """Run a command line in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    return command_line
