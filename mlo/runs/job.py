"""A job: the typed options of something that `mlo run NAME` runs, together with the code that they configure."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from mlo.options import registry
from mlo.options.config import Config
from mlo.runs.keep import Keep

if TYPE_CHECKING:
    import torch

    from mlo.runs.run import Run
    from mlo.training.engine import Engine

Results = Mapping[str, Mapping[str, float | str]]


class Job(Config):
    """Derive from it, add options as fields, write :meth:`engine`, and register the class in `mlo.problems`.

    `mlo list` and `mlo run NAME --help` show the class's docstring, and the help shows the description of each field.
    Users can leave out every field that has a default.

    Use ``functools.cached_property`` for what several stages share, such as data. It is computed under a seed of its
    own, made of the job's seed and its name, and changes no other random numbers. So it does not matter when it is
    first used, which is at another moment in a run that is resumed.

    Attributes:
        data_parallel: whether `torchrun -m mlo run NAME` may run it. Its engine then gives each process its share of
            every batch (`mlo.distributed.share`), and :meth:`run` writes and prints in the first process only
            (`on_main`).
        main_options: {heading: names of options} that `--help` shows; `--help-all` shows all. Without it, `--help`
            shows the options that the class itself declares.
        examples: command lines that `--help` shows, such as `mlo run NAME --steps 100`.
        presets: {name: YAML file of options}, for `mlo run NAME --preset PRESET`. `--help` shows the comment in the
            first line of each file.
    """

    data_parallel: ClassVar[bool] = False
    main_options: ClassVar[Mapping[str, Sequence[str]]] = {}
    examples: ClassVar[Sequence[str]] = ()
    presets: ClassVar[Mapping[str, Path]] = {}

    seed: int = Field(0, ge=0, lt=2**63, description="seed of all random numbers: the same seed gives the same run")
    device: str = Field("auto", description="cpu, cuda, cuda:1, or auto: a GPU if there is one, else the CPU")
    threads: int | None = Field(
        None, ge=1, description="CPU threads; null leaves the number to torch; small networks are fastest with 1"
    )
    deterministic: bool = Field(
        False,
        description="the same bits each time, on a GPU too; false lets cuDNN choose the fastest kernels for the shapes",
    )
    steps: int = Field(1000, ge=1, description="rounds of the main stage")
    log_every: int = Field(10, ge=1, description="rounds between two lines of metrics.jsonl; more after 100,000 lines")
    checkpoint_every: int = Field(200, ge=1, description="rounds between two checkpoints")
    keep: Keep = Field(Keep(), description="which checkpoints are kept")

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, prepared in vars(cls).items():
            if isinstance(prepared, cached_property):
                prepared.func = _under_own_seed(name, prepared.func)

    @property
    def torch_device(self) -> torch.device:
        """The device that ``device`` stands for on this machine.

        Raises:
            ConfigError: if there is no such device.
        """
        from mlo.training.devices import move_to

        return move_to([], self.device)

    def check(self) -> None:
        """Raise a ConfigError if something that the options name is missing, as far as this shows without training.

        It is called before a run starts. `mlo sweep` and `mlo reproduce` call it on the CPU before any of their runs
        starts, once for all runs that differ only in the seed. Override it, and call this one too, if options name
        files, data or code.
        """
        from mlo.training.devices import known_device

        known_device(self.device)

    @abstractmethod
    def engine(self) -> Engine:
        """Build the engine of the main stage."""

    def run(self, run: Run) -> Results | None:
        """Do everything that the job does in a run folder, stage by stage, and return the results.

        Override it to do more than train one engine. When a run is resumed, this method is called again from its
        start: stages that are finished return their stored results, so put everything that takes long into a stage.

        Returns:
            {row: {measure: number or text}}, with a row for each thing to compare (a method, a network). It is written
            to results.json, which `mlo compare` reads. None if there is nothing to compare.
        """
        return {"train": run.stage("train", self.engine, self.steps, lambda engine: dict(engine.metrics()))}

    def stages(self) -> Iterator[tuple[str, Callable[[], Engine], int]]:
        """Yield (name, function that builds the engine, rounds) of each stage.

        `mlo reproduce` measures a few rounds of each to estimate the cost, and `mlo graph NAME` prints the graphs of
        these engines. Override it together with :meth:`run` if there are stages other than the main one.
        """
        yield "train", self.engine, self.steps


def _under_own_seed(name: str, prepare: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The function of a job's cached property; its random numbers depend on the job's seed and the name alone."""

    @wraps(prepare)
    def prepared(job: Job) -> Any:
        from mlo.ops.rng import derived_seed, seeded

        with seeded(derived_seed(job.seed, f"prepare/{name}")):
            return prepare(job)

    return prepared


def load_job(name: str) -> type[Job]:
    """The job class registered under a name.

    Raises:
        ConfigError: if there is none, or it is no subclass of Job.
    """
    return registry.load_class(registry.PROBLEMS, name, Job)  # type: ignore[type-abstract]
