"""`mlo run lbt`: search with Learning by Teaching and without, train what was found, and show it on one page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

import mlo
from mlo.hypergradient import Darts
from mlo.options.config import EstimatorOption
from mlo.runs.job import Job
from mlo.runs.run import Run
from problems.data.splits import Data, Splits
from problems.evaluation.training import FinalTraining
from problems.jobs.report import save_genotypes, write_report
from problems.lbt import ArchValidate
from problems.nas import NOISE, Architecture, ArchitectureLogits, Genotype, derive, random_genotype
from problems.search.early_stop import found_by, grown_sharp
from problems.search.search import Search
from problems.search.students import make_student

Method = Literal["lbt", "plain", "random", "best_of_random"]
SPACE_TITLES = {"darts": "DARTS", "pc_darts": "PC-DARTS", "p_darts": "P-DARTS"}
STUDENT_TITLES = {"resnet18": "RN18", "resnet50": "RN50"}


class LbtJob(Job):
    """Learning by Teaching: a teacher's architecture from how well it learns and teaches; beside it, plain DARTS."""

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
    hypergradient: EstimatorOption = Field(Darts(), description="how teacher and student are differentiated through")
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
        if authors and (self.lookahead is False or not self._teacher_response.differentiates):
            raise ValueError(
                "variant: the authors' architecture steps are taken on virtual steps, and differentiated through the "
                "teacher's; leave lookahead out, and take another teacher_hypergradient than a first-order one"
            )
        if self._label_path == "paper" and not self._teacher_response.differentiates:
            raise ValueError(
                "pseudo_label_path: the paper's way leads through the teacher's training, which a first-order "
                "teacher_hypergradient leaves out, so nothing of the student would reach the architecture; take full"
            )
        return self

    def check(self) -> None:
        """See :class:`mlo.runs.job.Job`: the images, the student, and whether the images suit the final training."""
        super().check()
        self.evaluation.check(self._splits)
        if "lbt" in self.methods:
            self._new_student()

    def title(self, method: Method) -> str:
        """A method's name as the paper writes it: LBT(RN18, DARTS-2nd)."""
        space = SPACE_TITLES[self.search.space]
        if self.search.space == "darts":
            space += "-2nd" if self._teacher_response.differentiates else "-1st"
        lbt = f"LBT({STUDENT_TITLES.get(self.student, self.student)}, {space})"
        return {"lbt": lbt, "plain": space, "random": "random", "best_of_random": f"best of {self.draws} random"}[
            method
        ]

    def engine(self) -> mlo.Engine:
        """The first stage of the search by Learning by Teaching."""
        return self.search_engine("lbt")

    def search_engine(self, method: Method, found: list[ArchitectureLogits] | None = None) -> mlo.Engine:
        """A stage of a search, after those that found these logits: LBT's three levels, or two without a student."""
        lbt, found, search, splits = method == "lbt", found or [], self.search, self._splits
        space = search.stage_space(found)
        if self.search.warmup >= self.steps:
            raise ValueError(
                f"search.warmup: the architecture would never step, since a stage has {self.steps} rounds and the "
                f"warm-up takes {self.search.warmup}; lower it, or raise steps"
            )
        authors = self.variant == "authors"
        own = {"hypergradient": self.teacher_hypergradient, "clip_ahead": not authors}
        levels: list[mlo.Problem] = [search.teacher(space, len(found), self.steps, splits, **own)]
        if lbt:
            options: dict[str, Any] = {"pseudo_weight": self.pseudo_weight, "in_turn": authors}
            options["held"] = ("arch",) if self._label_path == "paper" else ()
            levels.append(
                search.student(self._new_student(), self.steps, splits, self.student_learns_from == "both", **options)
            )
        left_out = [] if lbt else ["student"]
        left_out += ["teacher"] if lbt and self.judged_by == "student" else []
        judged = {"student_weight": self.student_weight, "in_turn": authors and lbt}
        levels.append(search.architecture(space, splits, reads=dict.fromkeys(left_out), **judged))
        lookahead = self._teacher_response.lookahead or authors if self.lookahead is None else self.lookahead
        return mlo.Engine(levels, self.hypergradient, lookahead=lookahead, compile=self.compile, device=self.device)

    def training_engine(self, genotype: Genotype) -> mlo.Engine:
        """The final training of a genotype's network, on the train and the validation images or on all."""
        part = self._splits.labeled if self.evaluation.images == "labeled" else self._splits.everything
        return self.evaluation.engine(genotype, self._splits, part, self.evaluation.steps, self.device)

    def draw_engine(self, genotype: Genotype) -> mlo.Engine:
        """The training of a random draw's network on the train images, before the validation images judge it."""
        return self.evaluation.engine(genotype, self._splits, self._splits.train, self.evaluation.steps, self.device)

    def stages(self) -> Iterator[tuple[str, Callable[[], mlo.Engine], int]]:
        """Every stage of a run, with random architectures where those of a search are not known yet."""
        random = random_genotype(self.search.first_space, torch.Generator().manual_seed(0))
        for method in dict.fromkeys(self.methods):
            for stage in range(self.search.stages if method in ("lbt", "plain") else 0):
                logits = [Architecture(self.search.first_space)() for _ in range(stage)]
                yield self._stage_name(method, stage), partial(self.search_engine, method, logits), self.steps
            draws = self.draws if method == "best_of_random" else 0
            trainings = self.evaluation.steps * (1 + draws)
            yield f"train-{method}", partial(self.training_engine, random), trainings

    def run(self, run: Run) -> dict[str, dict[str, Any]]:
        """Search and train with each method in turn, then write genotypes, pictures, curves and the page."""
        genotypes: dict[str, Genotype] = {}
        results: dict[str, dict[str, Any]] = {}
        stages: dict[str, list[str]] = {}
        for method in dict.fromkeys(self.methods):
            genotypes[method], stages[method], found = self._find(run, method)
            training = f"train-{method}"
            told = run.stage(
                training, partial(self.training_engine, genotypes[method]), self.evaluation.steps, self._judge
            )
            cost = {"search_seconds": sum(map(run.seconds, stages[method])), "train_seconds": run.seconds(training)}
            results[method] = {
                "title": self.title(method),
                **told,
                **found,
                **_kept(genotypes[method], self.search.first_space.operations),
                **cost,
            }
        save_genotypes(run, genotypes)
        for result in results.values():
            print(f"{result['title']}: {result['test_error']:.2f} % test error, {result['parameters']:,} weights")
        if self.page:
            print(f"page: {write_report(run, genotypes, results, stages, self._about())}")
        return results

    def _find(self, run: Run, method: Method) -> tuple[Genotype, list[str], dict[str, Any]]:
        """What a method finds, the stages that it took, and what else is told of them."""
        generator = torch.Generator().manual_seed(self.seed)
        space = self.search.first_space
        if method == "random":
            return random_genotype(space, generator), [], {}
        if method == "best_of_random":
            drawn = [random_genotype(space, generator) for _ in range(self.draws)]
            names = [f"draw-{number + 1}" for number in range(self.draws)]
            judged = [
                run.stage(name, partial(self.draw_engine, genotype), self.evaluation.steps, self._judge_draw)
                for name, genotype in zip(names, drawn, strict=True)
            ]
            return drawn[min(range(self.draws), key=judged.__getitem__)], names, {}
        found: list[ArchitectureLogits] = []
        names = [self._stage_name(method, stage) for stage in range(self.search.stages)]
        for name in names:
            space = self.search.stage_space(found)
            build, result = partial(self.search_engine, method, list(found)), partial(self._found, method)
            told = run.stage(name, build, self.steps, result, stop=grown_sharp)
            found.append(ArchitectureLogits(torch.tensor(told["normal"]), torch.tensor(told["reduce"])))
        return derive(space, found[-1]), names, {k: v for k, v in told.items() if k not in ("normal", "reduce")}

    def _stage_name(self, method: Method, stage: int) -> str:
        return f"search-{method}" + (f"-{stage + 1}" if self.search.stages > 1 else "")

    def _found(self, method: Method, engine: mlo.Engine) -> dict[str, Any]:
        """The logits that a stage found, and how much of the architecture's gradient is the student's."""
        found = found_by(engine)
        part = student_part(engine) if method == "lbt" and self.judged_by == "both" else None
        return found if part is None else {**found, "student_part": part}

    def _judge(self, engine: mlo.Engine) -> dict[str, Any]:
        return self.evaluation.judge(engine, self._splits)

    def _judge_draw(self, engine: mlo.Engine) -> float:
        return float(self.evaluation.judge(engine, self._splits, self._splits.validation)["test_error"])

    def _about(self) -> str:
        splits, stages = self._splits, f" in each of {self.search.stages} stages" * (self.search.stages > 1)
        return (
            f"Architectures were searched for {self.steps} rounds{stages} on {self.data.source}: {len(splits.train):,} "
            f"training, {len(splits.validation):,} validation and {len(splits.unlabeled):,} unlabeled images."
        )

    def _new_student(self) -> nn.Module:
        splits = self._splits
        return make_student(self.student, splits.image_channels, splits.classes, splits.image_size)

    @property
    def _label_path(self) -> Literal["full", "paper"]:
        return self.pseudo_label_path or ("paper" if self.variant == "authors" else "full")

    @property
    def _teacher_response(self) -> mlo.Estimator:
        estimator = self.hypergradient if self.teacher_hypergradient is None else self.teacher_hypergradient
        assert isinstance(estimator, mlo.Estimator)
        return estimator

    @cached_property
    def _splits(self) -> Splits:
        return self.data.splits(self.seed, self.torch_device)


def _kept(genotype: Genotype, operations: tuple[str, ...]) -> dict[str, int]:
    """What searches are known to fail by: skip-connections of the normal cell, noise of both where there is any."""
    cells = (genotype.normal, genotype.reduce)
    normal, reduce = ([choice.operation for node in cell for choice in node] for cell in cells)
    kept = {"skip_connect": normal.count("skip_connect")}
    return kept | ({NOISE: (normal + reduce).count(NOISE)} if NOISE in operations else {})


def student_part(engine: mlo.Engine) -> float | None:
    """The norm of the student's part of the architecture's gradient over that of the teacher's, at the present state.

    The gradient is a sum of the two (equation 6), so the student's is what is left when the teacher's, taken with gamma
    = 0, is subtracted. The student's is as large as its and the teacher's steps are, so they are taken here with the
    learning rates that the search began with: at its end those have decayed. None where the teacher's is zero.
    """
    arch = engine.problems["arch"]
    assert isinstance(arch, ArchValidate)
    weight, in_turn = arch.student_weight, arch.in_turn
    groups = [group for name in ("teacher", "student") for group in engine.problems[name].optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    arch.in_turn = False
    try:
        for group in groups:
            group["lr"] = group.get("initial_lr", group["lr"])
        whole = engine.hypergradient("arch")
        arch.student_weight = 0.0
        teacher = engine.hypergradient("arch")
    finally:
        arch.student_weight, arch.in_turn = weight, in_turn
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
    of_student = torch.cat([(whole[n] - teacher[n]).flatten() for n in whole]).norm()
    of_teacher = torch.cat([part.flatten() for part in teacher.values()]).norm()
    return float(of_student / of_teacher) if of_teacher else None
