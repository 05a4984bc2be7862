"""`mlo run evaluate`: train the network of a published or a searched architecture from scratch, and test it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

import mlo
from mlo import ConfigError
from mlo.files import write_atomic
from mlo.ops import distributed
from mlo.options import registry
from mlo.runs.job import Job
from mlo.runs.run import Run
from problems.data.splits import Data, Splits
from problems.evaluation.training import Training
from problems.nas import PUBLISHED, Genotype


class EvaluateJob(Job):
    """The evaluation phase: an architecture's network trained from scratch and tested once, after its last step."""

    data_parallel: ClassVar[bool] = True

    steps: int = Field(300, ge=1, description="training steps")
    genotype: str = Field(
        description=f"what to train: {', '.join(PUBLISHED)}, or a genotype.json, or the run folder that holds one"
    )
    data: Data = Field(Data(), description="the images")
    training: Training = Field(Training(), description="the network and its training")

    def check(self) -> None:
        """See :class:`mlo.runs.job.Job`: the genotype, the images, and whether these suit the training."""
        super().check()
        find_genotype(self.genotype)
        self.training.check(self._splits)

    def engine(self) -> mlo.Engine:
        """The training, not begun."""
        return self._training(find_genotype(self.genotype))

    def _training(self, genotype: Genotype) -> mlo.Engine:
        splits = self._splits
        self.training.check(splits)
        part = splits.labeled if self.training.images == "labeled" else splits.everything
        return self.training.engine(genotype, splits, part, self.steps, self.device)

    def stages(self) -> Iterator[tuple[str, Callable[[], mlo.Engine], int]]:
        """The training, of a published architecture: the one asked for may be still to be searched."""
        yield "train", lambda: self._training(PUBLISHED["DARTS_V2"]), self.steps

    def run(self, run: Run) -> dict[str, dict[str, Any]]:
        """Train, test, and keep the genotype beside the result."""
        kept = run.path / "genotype.json"  # which a resumed run goes on with, whatever has become of the one named
        genotype = distributed.on_main(lambda: find_genotype(str(kept) if kept.exists() else self.genotype))

        def engine() -> mlo.Engine:
            made = self._training(genotype)
            distributed.on_main(lambda: write_atomic(kept, genotype.model_dump_json(indent=2) + "\n"))
            return made

        result = run.stage("train", engine, self.steps, lambda engine: self.training.judge(engine, self._splits))
        if distributed.is_main():
            print(
                f"{self.genotype}: {result['test_error']:.2f} % test error, {result['parameters']:,} weights, "
                f"{result['multiply_adds']:,} multiply-adds an image"
            )
        return {"network": {"genotype": self.genotype, **result, "train_seconds": run.seconds("train")}}

    @cached_property
    def _splits(self) -> Splits:
        with distributed.main_first() if self.data.download else nullcontext():
            return self.data.splits(self.seed, self.torch_device)


def find_genotype(name: str) -> Genotype:
    """A published genotype by its name, or the one in a JSON file or a run folder.

    Raises:
        ConfigError: if there is none, or the file holds no valid one.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]
    path = Path(name).expanduser()
    folder = path.is_dir()
    try:
        return Genotype.load(path / "genotype.json" if folder else path)
    except OSError as error:
        if folder:
            raise ConfigError(
                f"genotype: {name} holds no genotype.json that can be read ({error.strerror}), which a run leaves when "
                "it has found one; give the folder of such a run, a genotype.json, or a published name"
            ) from error
        published = registry.unknown(name, PUBLISHED, "among the published genotypes")
        raise ConfigError(
            f"genotype: {published}; and it is no file that can be read ({error.strerror}): give a name, a "
            "genotype.json, or the run folder that holds one"
        ) from error
    except ValueError as error:
        raise ConfigError(f"genotype: {error}") from error
