"""The options of `mlo run lbt`: search with Learning by Teaching and without, and train what was found.

Imports no torch, so that its help is there at once; :mod:`problems.jobs.lbt_stages` does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

import mlo
from mlo import EstimatorOption, Job
from problems.data.options import Data
from problems.evaluation.options import FinalTraining
from problems.search.options import Search

if TYPE_CHECKING:
    from mlo import Run
    from problems.data.splits import Splits
    from problems.nas import ArchitectureLogits, Genotype

Method = Literal["lbt", "plain", "random", "best_of_random"]
SPACE_TITLES = {"darts": "DARTS", "pc_darts": "PC-DARTS", "p_darts": "P-DARTS"}
STUDENT_TITLES = {"resnet18": "RN18", "resnet50": "RN50"}


class LbtJob(Job):
    """Learning by Teaching: a teacher's architecture from how well it learns and teaches; beside it, plain DARTS."""

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

    threads: int | None = Field(1, ge=1, description="CPU threads; null: torch's own choice. Small images want 1")
    steps: int = Field(60, ge=1, description="search rounds of a stage, each a step of every level")
    log_every: int = Field(2, ge=1, description="rounds between two lines of metrics.jsonl")
    checkpoint_every: int = Field(20, ge=1, description="rounds between two checkpoints")
    methods: tuple[Method, ...] = Field(
        ("lbt", "plain"),
        min_length=1,
        description="how to find an architecture; plain is the space's own method, without a student; random draws "
        "one, best_of_random several, and takes the best on the validation images",
    )
    hypergradient: EstimatorOption = Field(
        "darts", validate_default=True, description="how teacher and student are differentiated through"
    )
    teacher_hypergradient: EstimatorOption | None = Field(
        None, description="the teacher's own, if it is another; first_order makes DARTS the first-order one"
    )
    lookahead: bool | None = Field(
        None, description="architecture steps on virtual steps; null: as the teacher's estimator has it"
    )
    student: str = Field(
        "small",
        description="small, small_wide, resnet18, resnet50, another of torchvision's, or package.module:function",
    )
    pseudo_weight: float = Field(1.0, ge=0, description="lambda, the weight of the pseudo-labels in the student's loss")
    student_weight: float = Field(1.0, ge=0, description="gamma, the weight of the student in the validation loss")
    student_learns_from: Literal["both", "pseudo_labels"] = Field(
        "both", description="the student's data; pseudo_labels alone is the paper's second ablation"
    )
    judged_by: Literal["both", "student"] = Field(
        "both", description="whose validation loss judges; the student's alone is the paper's first ablation"
    )
    variant: Literal["paper", "authors"] = Field(
        "paper",
        description="authors: as their later code has it, teacher and student judge in turn and the student learns in "
        "turn, by other virtual than real steps",
    )
    pseudo_label_path: Literal["full", "paper"] | None = Field(
        None,
        description="paper leaves out how the pseudo-labels depend on the architecture directly; null: full, and paper "
        "in the authors' variant",
    )
    compile: bool = Field(
        False, description="run the search's passes and products through torch.compile; pays after thousands of rounds"
    )
    page: bool = Field(True, description="end with report.html and pictures; runs of a sweep are faster without")
    draws: int = Field(4, ge=1, description="architectures that best_of_random draws")
    data: Data = Field(Data(), description="the images")
    search: Search = Field(Search(), description="the search")
    evaluation: FinalTraining = Field(FinalTraining(), description="the final training")

    @model_validator(mode="after")
    def _check(self) -> Self:
        twice = [method for method in self.methods if self.methods.count(method) > 1]
        if twice:
            raise ValueError(f"methods: {twice[0]} is given twice; give each method once")
        every = self.search.eigenvalue_every
        if every is not None and every % self.log_every:
            raise ValueError(
                f"search.eigenvalue_every: eigenvalues are logged with the rest, but {every} is no multiple of "
                f"log_every, {self.log_every}; give a multiple of it, or another log_every"
            )
        if self.search.warmup >= self.steps:
            raise ValueError(
                f"search.warmup: the architecture would never step, since a stage has {self.steps} rounds and the "
                f"warm-up takes {self.search.warmup}; lower it, or raise steps"
            )
        authors = self.variant == "authors"
        if authors and (self.lookahead is False or not self.teacher_estimator.differentiates):
            raise ValueError(
                "variant: the authors' architecture steps are taken on virtual steps, and differentiated through the "
                "teacher's; leave lookahead out, and take another teacher_hypergradient than a first-order one"
            )
        if self.label_path == "paper" and not self.teacher_estimator.differentiates:
            raise ValueError(
                "pseudo_label_path: the paper's way leads through the teacher's training, which a first-order "
                "teacher_hypergradient leaves out, so nothing of the student would reach the architecture; take full"
            )
        return self

    def check(self) -> None:
        """Also check that the images can be loaded and suit the final training, and that the student takes them.

        See :meth:`mlo.Job.check`.
        """
        super().check()
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
        """The engine of a search stage; ``found``: the logits of the stages before it."""
        from problems.jobs import lbt_stages

        return lbt_stages.search_engine(self, method, found or [])

    def training_engine(self, genotype: Genotype) -> mlo.Engine:
        """The engine of the final training of a genotype's network."""
        from problems.jobs import lbt_stages

        return lbt_stages.training_engine(self, genotype)

    def stages(self) -> Iterator[tuple[str, Callable[[], mlo.Engine], int]]:
        """Every stage of a run; where a stage depends on what earlier ones find, with random architectures."""
        from problems.jobs import lbt_stages

        return lbt_stages.stages(self)

    def run(self, run: Run) -> dict[str, dict[str, Any]]:
        """Search and train with each method in turn, then write genotypes, pictures, curves and the page."""
        from problems.jobs import lbt_stages

        return lbt_stages.run_methods(self, run)

    @property
    def label_path(self) -> Literal["full", "paper"]:
        """``pseudo_label_path``, or the variant's own where none is given."""
        return self.pseudo_label_path or ("paper" if self.variant == "authors" else "full")

    @property
    def teacher_estimator(self) -> mlo.Estimator:
        """The estimator that the teacher is differentiated through."""
        estimator = self.hypergradient if self.teacher_hypergradient is None else self.teacher_hypergradient
        assert isinstance(estimator, mlo.Estimator)
        return estimator

    @cached_property
    def splits(self) -> Splits:
        """The images, loaded at the first use."""
        return self.data.splits(self.seed, self.torch_device)
