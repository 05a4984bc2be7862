"""`mlo run evaluate`: train the network of a published or a searched architecture from scratch, and test it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

import mlo
from mlo import ConfigError, distributed
from mlo.files import write_atomic
from mlo.job import Job
from mlo.run import Run
from problems.data import Data, Splits
from problems.nas import PUBLISHED, Genotype
from problems.training import Training


class EvaluateJob(Job):
    """The evaluation phase: an architecture's network trained from scratch and tested once, after its last step."""

    data_parallel: ClassVar[bool] = True

    steps: int = Field(300, ge=1, description="training steps")
    genotype: str = Field(
        description=f"what to train: {', '.join(PUBLISHED)}, or a genotype.json, or the run folder that holds one"
    )
    data: Data = Field(Data(), description="the images")
    training: Training = Field(Training(), description="the network and its training")

    def engine(self) -> mlo.Engine:
        """The training, not begun."""
        return self._training(find_genotype(self.genotype))

    def _training(self, genotype: Genotype) -> mlo.Engine:
        splits = self._splits
        self.training.check(splits)
        part = splits.labeled if self.training.images == "labeled" else splits.everything
        return self.training.engine(genotype, splits, part, self.steps, self.device)

    def rehearsal(self) -> Iterator[tuple[str, Callable[[], mlo.Engine], int]]:
        """The training, of a published architecture: the one asked for may be still to be searched."""
        yield "train", lambda: self._training(PUBLISHED["DARTS_V2"]), self.steps

    def run(self, run: Run) -> dict[str, dict[str, Any]]:
        """Train, test, and keep the genotype beside the result."""
        genotype = distributed.on_main(lambda: self._begun_with(run.path / "genotype.json"))
        engine = partial(self._training, genotype)
        result = run.stage("train", engine, self.steps, lambda engine: self.training.judge(engine, self._splits))
        if distributed.is_main():
            print(
                f"{self.genotype}: {result['test_error']:.2f} % test error, {result['parameters']:,} weights, "
                f"{result['multiply_adds']:,} multiply-adds an image"
            )
        return {"network": {"genotype": self.genotype, **result, "train_seconds": run.seconds("train")}}

    def _begun_with(self, kept: Path) -> Genotype:
        """The architecture that the run began with, whatever has become of the file that was named."""
        if not kept.exists():
            write_atomic(kept, find_genotype(self.genotype).model_dump_json(indent=2) + "\n")
        return find_genotype(str(kept))

    @cached_property
    def _splits(self) -> Splits:
        with distributed.main_first() if self.data.download else nullcontext():
            return self.data.splits(self.seed, self.placed)


def find_genotype(name: str) -> Genotype:
    """A published genotype by its name, or the one in a JSON file or a run folder.

    Raises:
        ConfigError: if there is none, or the file holds no valid one.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]
    path = Path(name).expanduser()
    path = path / "genotype.json" if path.is_dir() else path
    try:
        return Genotype.load(path)
    except OSError as error:
        raise ConfigError(
            f"genotype: {name!r} is neither published ({', '.join(PUBLISHED)}) nor a file that can be read "
            f"({error.strerror}); give a name, a genotype.json, or a run folder"
        ) from error
    except ValueError as error:
        raise ConfigError(f"genotype: {error}") from error
