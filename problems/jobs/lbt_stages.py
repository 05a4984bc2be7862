"""The stages of `mlo run lbt`: their engines, their results, and the report at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

import mlo
from mlo import Run
from problems.data.images import Part
from problems.evaluation import training
from problems.jobs.lbt import LbtJob, Method
from problems.jobs.report import save_genotypes, write_report
from problems.lbt import ArchValidate
from problems.nas import NOISE, Architecture, ArchitectureLogits, Genotype, derive, random_genotype
from problems.search import levels
from problems.search.early_stop import final_logits, should_stop
from problems.search.students import make_student


def search_engine(job: LbtJob, method: Method, found: list[ArchitectureLogits]) -> mlo.Engine:
    """The engine of a search stage: three levels for LBT, two without a student.

    ``found`` has the final logits of the stages before it.
    """
    lbt, search, splits = method == "lbt", job.search, job.splits
    space = search.stage_space(found)
    authors = job.variant == "authors"
    of_teacher = {"hypergradient": job.teacher_hypergradient, "clip_ahead": not authors}
    problems: list[mlo.Problem] = [levels.teacher(search, space, len(found), job.steps, splits, **of_teacher)]
    if lbt:
        options: dict[str, Any] = {"pseudo_weight": job.pseudo_weight, "in_turn": authors}
        options["held"] = ("arch",) if job.label_path == "paper" else ()
        with_labels = job.student_learns_from == "both"
        problems.append(levels.student(search, new_student(job), job.steps, splits, with_labels, **options))
    left_out = [] if lbt else ["student"]
    left_out += ["teacher"] if lbt and job.judged_by == "student" else []
    judged: dict[str, Any] = {
        "student_weight": job.student_weight,
        "in_turn": authors and lbt,
        "capturable": job.capture,
    }
    problems.append(levels.architecture(search, space, splits, reads=dict.fromkeys(left_out), **judged))
    lookahead = job.teacher_estimator.lookahead or authors if job.lookahead is None else job.lookahead
    how: dict[str, Any] = {"compile": job.compile, "capture": job.capture, "tf32": search.tf32, "device": job.device}
    how["non_finite"] = search.non_finite
    return mlo.Engine(problems, job.hypergradient, lookahead=lookahead, **how)


def new_student(job: LbtJob) -> nn.Module:
    """A new student network, as the job's options and images require."""
    splits = job.splits
    return make_student(job.student, splits.image_channels, splits.classes, splits.image_size)


def training_engine(job: LbtJob, genotype: Genotype) -> mlo.Engine:
    """The engine of the final training, on the training and validation images or on everything but the test images."""
    part = job.splits.labeled if job.evaluation.images == "labeled" else job.splits.everything
    return _training_engine(job, genotype, part)


def draw_engine(job: LbtJob, genotype: Genotype) -> mlo.Engine:
    """The training of a random draw's network on the training images, so that the validation images can judge it."""
    return _training_engine(job, genotype, job.splits.train)


def _training_engine(job: LbtJob, genotype: Genotype, part: Part) -> mlo.Engine:
    options = job.evaluation
    capture = job.capture and not options.drop_path  # it grows with the steps
    return training.training_engine(options, genotype, job.splits, part, options.steps, job.device, capture)


def stages(job: LbtJob) -> Iterator[tuple[str, Callable[[], mlo.Engine], int]]:
    """(name, function that builds the engine, rounds) of every stage, for `mlo graph` and cost estimates.

    A stage that depends on the results of earlier stages gets random architectures.
    """
    random = random_genotype(job.search.first_space, torch.Generator().manual_seed(0))
    for method in dict.fromkeys(job.methods):
        for stage in range(job.search.stages if method in ("lbt", "plain") else 0):
            logits = [Architecture(job.search.first_space)() for _ in range(stage)]
            yield _stage_name(job, method, stage), partial(job.search_engine, method, logits), job.steps
        draws = job.draws if method == "best_of_random" else 0
        yield f"train-{method}", partial(job.training_engine, random), job.evaluation.steps * (1 + draws)


def run_methods(job: LbtJob, run: Run) -> dict[str, dict[str, Any]]:
    """Search and train with each method in turn, then write genotypes, pictures, curves and the result page."""
    genotypes: dict[str, Genotype] = {}
    results: dict[str, dict[str, Any]] = {}
    searches: dict[str, list[str]] = {}
    for method in dict.fromkeys(job.methods):
        genotype, searches[method], found = _find_architecture(job, run, method)
        stage = f"train-{method}"
        trained = run.stage(
            stage,
            partial(job.training_engine, genotype),
            job.evaluation.steps,
            lambda engine: training.judge(engine, job.splits),
        )
        genotypes[method] = genotype
        results[method] = {
            "title": job.title(method),
            **trained,
            **found,
            **_failure_signs(genotype, job.search.first_space.operations),
            "search_seconds": sum(map(run.seconds, searches[method])),
            "train_seconds": run.seconds(stage),
        }
    save_genotypes(run, genotypes)
    for result in results.values():
        print(f"{result['title']}: {result['test_error']:.2f} % test error, {result['parameters']:,} weights")
    if job.page:
        print(f"page: {write_report(run, genotypes, results, searches, _about(job))}")
    return results


def _find_architecture(job: LbtJob, run: Run, method: Method) -> tuple[Genotype, list[str], dict[str, Any]]:
    """The genotype that a method finds, the names of its search stages, and further results of the last stage."""
    generator = torch.Generator().manual_seed(job.seed)
    space = job.search.first_space
    if method == "random":
        return random_genotype(space, generator), [], {}
    if method == "best_of_random":
        drawn = [random_genotype(space, generator) for _ in range(job.draws)]
        names = [f"draw-{number + 1}" for number in range(job.draws)]
        errors = [
            run.stage(name, partial(draw_engine, job, genotype), job.evaluation.steps, partial(judge_draw, job))
            for name, genotype in zip(names, drawn, strict=True)
        ]
        return drawn[min(range(job.draws), key=errors.__getitem__)], names, {}
    logits: list[ArchitectureLogits] = []
    names = [_stage_name(job, method, stage) for stage in range(job.search.stages)]
    for name in names:
        space = job.search.stage_space(logits)
        build, result = partial(job.search_engine, method, list(logits)), partial(_search_result, job, method)
        found = run.stage(name, build, job.steps, result, stop=should_stop)
        logits.append(ArchitectureLogits(torch.tensor(found["normal"]), torch.tensor(found["reduce"])))
    return derive(space, logits[-1]), names, {k: v for k, v in found.items() if k not in ("normal", "reduce")}


def _stage_name(job: LbtJob, method: Method, stage: int) -> str:
    return f"search-{method}" + (f"-{stage + 1}" if job.search.stages > 1 else "")


def _search_result(job: LbtJob, method: Method, engine: mlo.Engine) -> dict[str, Any]:
    """The final logits of a stage, and the size of the student's part of the architecture's gradient."""
    found = final_logits(engine)
    part = student_part(engine) if method == "lbt" and job.judged_by == "both" else None
    return found if part is None else {**found, "student_part": part}


def judge_draw(job: LbtJob, engine: mlo.Engine) -> float:
    """The error of a random draw's network on the validation images, in percent."""
    return float(training.judge(engine, job.splits, job.splits.validation)["test_error"])


def _about(job: LbtJob) -> str:
    """A sentence about the search, for the result page."""
    splits, each = job.splits, f" in each of {job.search.stages} stages" * (job.search.stages > 1)
    return (
        f"Architectures were searched for {job.steps} rounds{each} on {job.data.source}: {len(splits.train):,} "
        f"training, {len(splits.validation):,} validation and {len(splits.unlabeled):,} unlabeled images."
    )


def _failure_signs(genotype: Genotype, operations: tuple[str, ...]) -> dict[str, int]:
    """Counts that show a failed search: skip-connections in the normal cell and, if it is in the space, noise."""
    cells = (genotype.normal, genotype.reduce)
    normal, reduce = ([choice.operation for node in cell for choice in node] for cell in cells)
    counts = {"skip_connect": normal.count("skip_connect")}
    return counts | ({NOISE: (normal + reduce).count(NOISE)} if NOISE in operations else {})


def student_part(engine: mlo.Engine) -> float | None:
    """The norm of the student's part of the architecture's gradient, divided by the norm of the teacher's part.

    The gradient is the sum of the two (equation 6). The teacher's part is the gradient with gamma = 0, and the
    student's part is the rest. The student's part is proportional to the learning rates, which have decayed at the end
    of a search. So both are computed with the initial learning rates. Returns None if the teacher's part is zero.
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
