"""`mlo run evaluate`: train the network of a published or a searched architecture from scratch, and test it.

Does not import torch before it runs, so that the help appears at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

import mlo
from mlo import ConfigError, Job, distributed
from mlo.options import registry
from mlo.runs.sealed import read_sealed, write_sealed
from problems.data.options import Data
from problems.evaluation.options import Training
from problems.jobs.capture import check_capture
from problems.nas import PUBLISHED, Genotype

if TYPE_CHECKING:
    from mlo import Run
    from problems.data.splits import Splits


class EvaluateJob(Job):
    """Train an architecture's network from scratch, and test it once, after the last step."""

    data_parallel: ClassVar[bool] = True
    main_options: ClassVar[Mapping[str, Sequence[str]]] = {
        "What is trained": ("genotype", "training.cells", "training.channels"),
        "Images": ("data.source", "data.download"),
        "Training": ("steps", "training.batch_size", "training.learning_rate", "training.images"),
        "Run": ("seed", "device"),
    }
    examples: ClassVar[Sequence[str]] = (
        "mlo run evaluate --genotype DARTS_V2",
        "mlo run evaluate --genotype runs/MY_SEARCH/genotype.json --seed 1",
        "mlo run evaluate --genotype PDARTS --data.source cifar10 --data.download --training.cells 20",
        "mlo sweep evaluate --output runs/seeds --genotype DARTS_V2 --seeds 3",
        "mlo graph evaluate --genotype DARTS_V2",
    )

    steps: int = Field(300, ge=1, description="training steps")
    genotype: str = Field(
        description=f"a published name, a genotype.json, or a run folder; the names are {', '.join(PUBLISHED)}"
    )
    data: Data = Field(Data(), description="the images")
    training: Training = Field(Training(), description="the network and its training")
    capture: bool = Field(
        False,
        description="record a step as a CUDA graph, and replay it; needs a CUDA GPU, and training without drop_path",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.capture and self.training.drop_path:
            raise ValueError(
                "capture: cannot be used with training.drop_path, which grows with the steps; write only one of them"
            )
        return self

    def check(self) -> None:
        """Also check that the genotype can be found, and that the images can be loaded and fit the training.

        See :meth:`mlo.Job.check`.
        """
        super().check()
        check_capture(self.capture, self.device)
        from problems.evaluation.training import check_images

        find_genotype(self.genotype)
        check_images(self.training, self.splits)

    def engine(self) -> mlo.Engine:
        """The engine of the training."""
        return self._training(find_genotype(self.genotype))

    def _training(self, genotype: Genotype) -> mlo.Engine:
        from problems.evaluation.training import check_images, training_engine

        splits = self.splits
        check_images(self.training, splits)
        part = splits.labeled if self.training.images == "labeled" else splits.everything
        return training_engine(self.training, genotype, splits, part, self.steps, self.device, self.capture)

    def stages(self) -> Iterator[tuple[str, Callable[[], mlo.Engine], int]]:
        """The training, with a published architecture, because the one in ``genotype`` may not exist yet."""
        yield "train", lambda: self._training(PUBLISHED["DARTS_V2"]), self.steps

    def run(self, run: Run) -> dict[str, dict[str, Any]]:
        """Train, test, and save a copy of the genotype in the run folder."""
        from problems.evaluation.training import judge

        copy = run.path / "genotype.json"  # a resumed run uses this copy, even if the original has changed
        genotype = distributed.on_main(lambda: _stored(copy) if copy.exists() else find_genotype(self.genotype))

        def build() -> mlo.Engine:
            engine = self._training(genotype)
            distributed.on_main(lambda: write_sealed(copy, genotype.model_dump_json(indent=2) + "\n"))
            return engine

        result = run.stage("train", build, self.steps, lambda engine: judge(engine, self.splits))
        if distributed.is_main():
            print(
                f"{self.genotype}: {result['test_error']:.2f} % test error, {result['parameters']:,} weights, "
                f"{result['multiply_adds']:,} multiply-adds for an image"
            )
        return {"network": {"genotype": self.genotype, **result, "train_seconds": run.seconds("train")}}

    @cached_property
    def splits(self) -> Splits:
        """The images, loaded when first used."""
        with distributed.main_first() if self.data.download else nullcontext():
            return self.data.splits(self.seed, self.torch_device)


def _stored(copy: Path) -> Genotype:
    """The genotype that the run was started with."""
    try:
        read_sealed(copy)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{copy}: cannot be read ({error}); put the genotype that the run was started with there, and remove "
            f"{copy.name}.sha256"
        ) from error
    return find_genotype(str(copy))


def find_genotype(name: str) -> Genotype:
    """A genotype from the name of a published one, the path of a JSON file, or a run folder.

    Raises:
        ConfigError: if there is no such genotype, or the file does not contain a valid one.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]
    path, folder = Path(name).expanduser(), False
    try:
        folder = path.is_dir()
        return Genotype.load(path / "genotype.json" if folder else path)
    except OSError as error:
        if folder:
            raise ConfigError(
                f"genotype: the genotype.json in {name} cannot be read ({error.strerror}); give the folder of a run "
                "that has found an architecture, a genotype.json, or the name of a published genotype"
            ) from error
        published = registry.unknown(name, PUBLISHED, "among the published genotypes")
        raise ConfigError(
            f"genotype: {published}; it cannot be read as a file either ({error.strerror}); give one of these names, a "
            "genotype.json, or a run folder that contains one"
        ) from error
    except ValueError as error:
        raise ConfigError(f"genotype: {error}") from error
