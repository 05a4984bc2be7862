"""`mlo run lbt`: search with Learning by Teaching and with DARTS, train what they found, and show it on one page."""

from __future__ import annotations

import json
from functools import cached_property, partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

import mlo
from mlo.config import Config
from mlo.hypergradient import Darts, ResponseOption
from mlo.job import Job
from mlo.run import Run
from problems.data import Data, Splits
from problems.lbt import ArchValidate, StudentTeach, TeacherTrain
from problems.nas import DARTS, Architecture, EvaluationNetwork, Genotype, Supernet, derive, random_genotype
from problems.report import TITLES, write_report
from problems.students import small_student
from problems.training import TrainNetwork, test_error

Method = Literal["lbt", "darts", "random"]


class Search(Config):
    """The supernet, and how it, the student and the architecture are trained (the step counts are `steps`)."""

    channels: int = Field(4, ge=1, description="channels of the supernet's first cell")
    cells: int = Field(3, ge=1, description="cells of the supernet")
    batch_size: int = Field(50, ge=2, description="images in a batch, of each kind")
    learning_rate: float = Field(0.05, gt=0, description="of teacher and student, decaying to 0.001 by a cosine")
    architecture_learning_rate: float = Field(0.01, gt=0, description="of the architecture's Adam")


class Evaluation(Config):
    """The networks that the found architectures stand for, trained on train and validation images together."""

    steps: int = Field(300, ge=1, description="training steps")
    channels: int = Field(8, ge=1, description="channels of the first cell")
    cells: int = Field(3, ge=1, description="cells")
    batch_size: int = Field(50, ge=2, description="images in a batch")
    learning_rate: float = Field(0.05, gt=0, description="of SGD, decaying to 0 by a cosine")
    drop_path: float = Field(0.0, ge=0, lt=1, description="last probability of dropping a path")
    auxiliary: bool = Field(False, description="train with an auxiliary head (for images of 32x32 and up)")


class LbtJob(Job):
    """Learning by Teaching: a teacher's architecture from how well it learns and teaches; beside it, plain DARTS."""

    threads: int | None = Field(1, ge=1, description="CPU threads; null: torch's own choice. Small images want 1")
    steps: int = Field(60, ge=1, description="search steps, each one of all three levels")
    log_every: int = Field(2, ge=1, description="rounds between two lines of metrics.jsonl")
    checkpoint_every: int = Field(20, ge=1, description="rounds between two checkpoints")
    methods: tuple[Method, ...] = Field(
        ("lbt", "darts"), min_length=1, description="what to search with; random draws an architecture as a baseline"
    )
    hypergradient: ResponseOption = Field(Darts(), description="how the levels are differentiated through")
    lookahead: bool | None = Field(
        None, description="architecture steps on virtual steps; null: as the estimator has it"
    )
    pseudo_weight: float = Field(1.0, ge=0, description="lambda, the weight of the pseudo-labels in the student's loss")
    student_weight: float = Field(1.0, ge=0, description="gamma, the weight of the student in the validation loss")
    student_learns_from: Literal["both", "pseudo_labels"] = Field(
        "both", description="the student's data; pseudo_labels alone is the paper's second ablation"
    )
    judged_by: Literal["both", "student"] = Field(
        "both", description="whose validation loss judges; the student's alone is the paper's first ablation"
    )
    pseudo_label_path: Literal["full", "paper"] = Field(
        "full", description="paper leaves out how the pseudo-labels depend on the architecture directly"
    )
    data: Data = Field(Data(), description="the images")
    search: Search = Field(Search(), description="the search")
    evaluation: Evaluation = Field(Evaluation(), description="the final training")

    def engine(self) -> mlo.Engine:
        """The search by Learning by Teaching."""
        return self.search_engine("lbt")

    def search_engine(self, method: Method) -> mlo.Engine:
        """A new search: the three levels of LBT, or teacher and architecture alone, which is DARTS."""
        lbt = method == "lbt"
        data, size = self._splits, self.search.batch_size
        labeled, unlabeled = data.train.batches(size), data.unlabeled.batches(size)
        levels: list[mlo.Problem] = [TeacherTrain("teacher", data=labeled, **self._trained(self._supernet()))]
        if lbt:
            taught = {"unlabeled": unlabeled}
            if self.student_learns_from == "both":
                taught["labeled"] = data.train.batches(size)
            held = ("arch",) if self.pseudo_label_path == "paper" else ()
            student = self._trained(small_student(self._image_channels, self._classes))
            levels.append(StudentTeach("student", data=taught, pseudo_weight=self.pseudo_weight, held=held, **student))
        architecture = Architecture(DARTS)
        rate = self.search.architecture_learning_rate
        left_out = [] if lbt else ["student"]
        left_out += ["teacher"] if lbt and self.judged_by == "student" else []
        levels.append(
            _ArchValidate(
                "arch",
                module=architecture,
                optimizer=Adam(architecture.parameters(), lr=rate, betas=(0.5, 0.999), weight_decay=1e-3),
                data=data.validation.batches(size),
                student_weight=self.student_weight,
                reads=dict.fromkeys(left_out),
            )
        )
        return mlo.Engine(levels, self.hypergradient, lookahead=self.lookahead, device=self.device)

    def training_engine(self, genotype: Genotype) -> mlo.Engine:
        """The final training of a genotype's network, on the train and the validation images."""
        options = self.evaluation
        network = EvaluationNetwork(
            genotype, options.channels, options.cells, self._classes, self._image_channels, options.auxiliary
        )
        optimizer = SGD(network.parameters(), lr=options.learning_rate, momentum=0.9, weight_decay=3e-4)
        problem = TrainNetwork(
            "network",
            module=network,
            optimizer=optimizer,
            scheduler=CosineAnnealingLR(optimizer, options.steps),
            data=self._splits.labeled.batches(options.batch_size),
            clip_norm=5.0,
            total_steps=options.steps,
            drop_path=options.drop_path,
        )
        return mlo.Engine([problem], device=self.device)

    def run(self, run: Run) -> None:
        """Search and train with each method in turn, then write genotypes, pictures, curves and the page."""
        found: dict[str, Genotype] = {}
        results: dict[str, dict[str, Any]] = {}
        for method in dict.fromkeys(self.methods):
            genotype = found[method] = self._find(run, method)
            results[method] = run.stage(
                f"train-{method}",
                partial(self.training_engine, genotype),
                self.evaluation.steps,
                self._judge,
            )
        for name, result in results.items():
            print(f"{TITLES[name]}: {result['test_error']:.2f} % test error, {result['parameters']:,} weights")
        data = self.data
        about = (
            f"Architectures were searched for {self.steps} steps on {data.source}: {data.train_size} training, "
            f"{data.validation_size} validation and {data.unlabeled_size} unlabeled images."
        )
        print(f"page: {write_report(run, found, results, about)}")

    def _find(self, run: Run, method: Method) -> Genotype:
        if method == "random":
            return random_genotype(DARTS, torch.Generator().manual_seed(self.seed))

        def result(engine: mlo.Engine) -> Any:
            return derive(DARTS, engine.problems["arch"].module()).model_dump(mode="json")

        found = run.stage(f"search-{method}", lambda: self.search_engine(method), self.steps, result)
        return Genotype.model_validate_json(json.dumps(found))

    def _judge(self, engine: mlo.Engine) -> dict[str, Any]:
        network = engine.problems["network"].module
        assert isinstance(network, EvaluationNetwork)
        weights = sum(p.numel() for p in network.parameters())
        test = self._splits.test
        return {"test_error": test_error(network, test), "test_images": len(test.labels), "parameters": weights}

    def _supernet(self) -> Supernet:
        return Supernet(DARTS, self.search.channels, self.search.cells, self._classes, self._image_channels)

    def _trained(self, module: nn.Module) -> dict[str, Any]:
        """What teacher and student have in common: SGD with a cosine from the learning rate down to 0.001."""
        rate = self.search.learning_rate
        optimizer = SGD(module.parameters(), lr=rate, momentum=0.9, weight_decay=3e-4)
        scheduler = CosineAnnealingLR(optimizer, self.steps, eta_min=min(0.001, rate))
        return {"module": module, "optimizer": optimizer, "scheduler": scheduler, "clip_norm": 5.0}

    @cached_property
    def _splits(self) -> Splits:
        return self.data.splits(self.seed)

    @property
    def _image_channels(self) -> int:
        return self._splits.image_channels

    @property
    def _classes(self) -> int:
        return self._splits.classes


class _ArchValidate(ArchValidate):
    """The architecture's level, which reports the mean weight of each operation."""

    def metrics(self) -> dict[str, Tensor]:
        """{"normal/skip_connect": mean over the edges of its softmax weight, ...}."""
        kinds = self.module()._asdict().items()
        means = {kind: logits.detach().softmax(dim=-1).mean(dim=0) for kind, logits in kinds}
        return {f"{kind}/{name}": mean[i] for kind, mean in means.items() for i, name in enumerate(DARTS.operations)}
