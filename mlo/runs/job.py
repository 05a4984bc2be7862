"""A job: the typed options of something that `mlo run NAME` runs, together with the code that they configure."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mlo.options import registry
from mlo.options.config import Config

if TYPE_CHECKING:
    import torch

    from mlo.runs.run import Run
    from mlo.training.engine import Engine


Results = Mapping[str, Mapping[str, float | str]]


class Job(Config):
    """Derive from it, add options as fields, write :meth:`engine`, and register the class in `mlo.problems`.

    The class's docstring is what `mlo list` and `mlo run NAME --help` say of it, and each field's description is what
    the help says of that option. Every field that has a default can be left out by the user.

    Attributes:
        data_parallel: whether `torchrun -m mlo run NAME` may run it. Its engine then gives each process its share of
            every batch (`mlo.distributed.share`), and :meth:`run` writes and prints in the first one alone (`on_main`).
        main_options: {heading: names of options} that `--help` shows; `--help-all` shows all. Without it, `--help`
            shows the options that the class itself declares.
        examples: command lines that `--help` shows, such as `mlo run NAME --steps 100`.
    """

    data_parallel: ClassVar[bool] = False
    main_options: ClassVar[Mapping[str, Sequence[str]]] = {}
    examples: ClassVar[Sequence[str]] = ()

    seed: int = Field(0, ge=0, description="where all randomness starts: the same seed gives the same run")
    device: str = Field(
        "auto", description="where to compute: cpu, cuda, cuda:1, or auto for a card where there is one"
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads; null: torch's own choice, which small networks are slower with than with 1",
    )
    steps: int = Field(1000, ge=1, description="rounds of the main stage")
    log_every: int = Field(10, ge=1, description="rounds between two lines of metrics.jsonl")
    checkpoint_every: int = Field(200, ge=1, description="rounds between two checkpoints")

    @property
    def placed(self) -> torch.device:
        """The device that ``device`` stands for on this machine.

        Raises:
            ConfigError: if there is no such device.
        """
        from mlo.training.plan import place

        return place([], self.device)

    def check(self) -> None:
        """Raise a ConfigError where the options ask for what is not there, as far as it shows without training.

        It is asked before a run begins, and by `mlo sweep` of each of its kinds of runs before any of them does, on the
        CPU. Override it, calling this one too, where options name files, data or code.
        """
        from mlo.training.plan import known_device

        known_device(self.device)

    @abstractmethod
    def engine(self) -> Engine:
        """The engine of the main stage, newly built."""

    def run(self, run: Run) -> Results | None:
        """All that the job does in a run folder, stage by stage; returns what it found.

        Override it to do more than train. It is called again, from the top, when a run is resumed: stages that are
        finished return their stored results, so whatever takes long belongs in a stage.

        Returns:
            {row: {measure: number or text}}, a row for each thing that is to be compared (a method, a network); it is
            written to results.json, which `mlo compare` reads. None where there is nothing to compare.
        """
        return {"train": run.stage("train", self.engine, self.steps, lambda engine: dict(engine.metrics()))}

    def stages(self) -> Iterator[tuple[str, Callable[[], Engine], int]]:
        """(name, builder of an engine, rounds) of the stages whose cost can be measured by a few of their rounds.

        `mlo graph NAME` prints the graphs of these engines.

        Override it together with :meth:`run` where there are others than the main stage.
        """
        yield "train", self.engine, self.steps


def load_job(name: str) -> type[Job]:
    """The job class registered under a name.

    Raises:
        ConfigError: if there is none, or it is no subclass of Job.
    """
    return registry.load_class(registry.PROBLEMS, name, Job)  # type: ignore[type-abstract]
