"""The options of `mlo run lbt`: search with and without Learning by Teaching, and train the networks found.

Does not import torch, so that the help appears at once. :mod:`problems.jobs.lbt_stages` does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

import mlo
from mlo import EstimatorOption, Job
from problems.data.options import Data
from problems.evaluation.options import FinalTraining
from problems.jobs.capture import check_capture
from problems.search.options import Search

if TYPE_CHECKING:
    from mlo import Run
    from problems.data.splits import Splits
    from problems.nas import ArchitectureLogits, Genotype

Method = Literal["lbt", "plain", "random", "best_of_random"]
SPACE_TITLES = {"darts": "DARTS", "pc_darts": "PC-DARTS", "p_darts": "P-DARTS"}
STUDENT_TITLES = {"resnet18": "RN18", "resnet50": "RN50"}


class LbtJob(Job):
    """Search architectures with Learning by Teaching and with plain DARTS, then train and test the networks found."""

    main_options: ClassVar[Mapping[str, Sequence[str]]] = {
        "Method": ("methods", "hypergradient", "student", "pseudo_weight", "student_weight"),
        "Images": ("data.source", "data.download"),
        "Search and final training": ("search.space", "search.cells", "steps", "evaluation.cells", "evaluation.steps"),
        "Run": ("seed", "device"),
    }
    examples: ClassVar[Sequence[str]] = (
        "mlo run lbt",
        "mlo run lbt --methods '[lbt, random]' --student resnet18 --seed 1",
        "mlo run lbt --data.source cifar10 --data.download --search.space pc_darts --steps 2000",
        "mlo sweep lbt --output runs/weights --grid.student_weight '[0.5, 1, 2]' --seeds 3",
        "mlo graph lbt --judged-by student",
    )

    presets: ClassVar[Mapping[str, Path]] = {"h100": Path(__file__).parent / "presets" / "h100.yaml"}

    threads: int | None = Field(
        1, ge=1, description="CPU threads; null: torch's default. 1 is fastest for small images"
    )
    steps: int = Field(60, ge=1, description="rounds of the search; of each stage, if it has several")
    log_every: int = Field(2, ge=1, description="log metrics every so many rounds")
    checkpoint_every: int = Field(20, ge=1, description="save a checkpoint every so many rounds")
    methods: tuple[Method, ...] = Field(
        ("lbt", "plain"),
        min_length=1,
        description="how to find architectures; lbt: Learning by Teaching; plain: the same search without a student; "
        "random: draw one; best_of_random: draw several and keep the best on the validation images",
    )
    hypergradient: EstimatorOption = Field(
        "darts",
        validate_default=True,
        description="how to differentiate through teacher and student",
    )
    teacher_hypergradient: EstimatorOption | None = Field(
        None,
        description="the same for the teacher alone; first_order: first-order DARTS; null: as hypergradient",
    )
    lookahead: bool | None = Field(
        None,
        description="step the architecture on virtual steps of the networks; null: the default of the teacher's "
        "estimator (true for darts)",
    )
    student: str = Field(
        "small",
        description="small, small_wide, resnet18, any torchvision classifier; or package.module:function",
    )
    pseudo_weight: float = Field(1.0, ge=0, description="lambda, the weight of the pseudo-labels in the student's loss")
    student_weight: float = Field(1.0, ge=0, description="gamma, the weight of the student in the validation loss")
    student_learns_from: Literal["both", "pseudo_labels"] = Field(
        "both",
        description="labeled images and pseudo-labels (both), or pseudo-labels alone, the paper's second ablation",
    )
    judged_by: Literal["both", "student"] = Field(
        "both",
        description="the architecture is judged by the validation loss of teacher and student (both), or of the "
        "student alone, the paper's first ablation",
    )
    variant: Literal["paper", "authors"] = Field(
        "paper",
        description="the algorithm of the paper, or the different steps of its authors' later code (docs/lbt.md)",
    )
    pseudo_label_path: Literal["full", "paper"] | None = Field(
        None,
        description="paper: leave out how the pseudo-labels depend directly on the architecture; full: include it; "
        "null: full (paper with variant authors)",
    )
    compile: bool = Field(
        False, description="compile the search with torch.compile; pays off after thousands of rounds"
    )
    capture: bool = Field(
        False, description="record a round of each stage as a CUDA graph, and replay it; needs a CUDA GPU (docs/lbt.md)"
    )
    page: bool = Field(True, description="write report.html and pictures at the end; false makes sweeps faster")
    draws: int = Field(4, ge=1, description="number of architectures that best_of_random draws")
    data: Data = Field(Data(), description="the images")
    search: Search = Field(Search(), description="the search")
    evaluation: FinalTraining = Field(FinalTraining(), description="the final training")

    @model_validator(mode="after")
    def _check(self) -> Self:
        twice = [method for method in self.methods if self.methods.count(method) > 1]
        if twice:
            raise ValueError(f"methods: {twice[0]} is given twice; write each method once")
        every = self.search.eigenvalue_every
        if every is not None and every % self.log_every:
            raise ValueError(
                f"search.eigenvalue_every: {every} is not a multiple of log_every ({self.log_every}), and eigenvalues "
                "are logged together with the other metrics; write a multiple, or change log_every"
            )
        if self.search.warmup >= self.steps:
            raise ValueError(
                f"search.warmup: {self.search.warmup} rounds of warm-up leave no step for the architecture, since a "
                f"stage has {self.steps} rounds; lower warmup, or raise steps"
            )
        authors = self.variant == "authors"
        if authors and (self.lookahead is False or not self.teacher_estimator.differentiates):
            raise ValueError(
                "variant: authors needs lookahead and a hypergradient through the teacher's steps; leave out "
                "lookahead: false, and do not use first_order for the teacher"
            )
        if self.label_path == "paper" and not self.teacher_estimator.differentiates:
            raise ValueError(
                "pseudo_label_path: with paper and a first-order estimator for the teacher, the student has no effect "
                "on the architecture; write pseudo_label_path: full, or another teacher_hypergradient"
            )
        return self

    def check(self) -> None:
        """Also check that rounds can be captured if they should be, and that the images can be loaded and fit.

        The final training and the student have to accept them.

        See :meth:`mlo.Job.check`.
        """
        super().check()
        check_capture(self.capture, self.device)
        from problems.evaluation.training import check_images
        from problems.jobs.lbt_stages import new_student

        check_images(self.evaluation, self.splits)
        if "lbt" in self.methods:
            new_student(self)

    def title(self, method: Method) -> str:
        """A method's name as the paper writes it: LBT(RN18, DARTS-2nd)."""
        space = SPACE_TITLES[self.search.space]
        if self.search.space == "darts":
            space += "-2nd" if self.teacher_estimator.differentiates else "-1st"
        lbt = f"LBT({STUDENT_TITLES.get(self.student, self.student)}, {space})"
        return {"lbt": lbt, "plain": space, "random": "random", "best_of_random": f"best of {self.draws} random"}[
            method
        ]

    def engine(self) -> mlo.Engine:
        """The first stage of the search by Learning by Teaching."""
        return self.search_engine("lbt")

    def search_engine(self, method: Method, found: list[ArchitectureLogits] | None = None) -> mlo.Engine:
        """The engine of a search stage; ``found`` has the final logits of the stages before it."""
        from problems.jobs import lbt_stages

        return lbt_stages.search_engine(self, method, found or [])

    def training_engine(self, genotype: Genotype) -> mlo.Engine:
        """The engine of the final training of a genotype's network."""
        from problems.jobs import lbt_stages

        return lbt_stages.training_engine(self, genotype)

    def stages(self) -> Iterator[tuple[str, Callable[[], mlo.Engine], int]]:
        """Every stage of a run, with random architectures where a stage depends on the results of earlier ones."""
        from problems.jobs import lbt_stages

        return lbt_stages.stages(self)

    def run(self, run: Run) -> dict[str, dict[str, Any]]:
        """Search and train with each method in turn, then write genotypes, pictures, curves and the result page."""
        from problems.jobs import lbt_stages

        return lbt_stages.run_methods(self, run)

    @property
    def label_path(self) -> Literal["full", "paper"]:
        """``pseudo_label_path``, or the variant's default if it is null."""
        return self.pseudo_label_path or ("paper" if self.variant == "authors" else "full")

    @property
    def teacher_estimator(self) -> mlo.Estimator:
        """The estimator of the teacher."""
        estimator = self.hypergradient if self.teacher_hypergradient is None else self.teacher_hypergradient
        assert isinstance(estimator, mlo.Estimator)
        return estimator

    @cached_property
    def splits(self) -> Splits:
        """The images, loaded at the first use."""
        return self.data.splits(self.seed, self.torch_device)
