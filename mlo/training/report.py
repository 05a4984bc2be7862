"""The report on an engine: how it trains each problem, and what of it runs compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mlo.hypergradient import Estimator
from mlo.steps import compiled
from mlo.steps.level import Level
from mlo.training.captured import Captured
from mlo.training.plan import Plan


@dataclass(frozen=True)
class ProblemReport:
    """How an engine trains one problem.

    Attributes:
        name: the problem's name.
        level: 1 for the lowest.
        steps: number of steps in a round.
        looks_ahead: whether it steps after virtual (lookahead) steps of the problems below it.
        through: the lower problems that its hypergradient goes through, highest level first; empty for a problem that
            steps on the plain gradient of its loss.
        inner: the lower problems whose steps are part of its curvature (``Engine(..., inner_path=True)``).
        estimator: the estimator with which it is differentiated through, with its options; None if it is not.
        recorded: how many of its steps in a round are recorded for these hypergradients.
        graph_bytes: memory of one of its gradients with its graph, and of the variables that it was taken at; None
            until such a graph was first kept.
        loss_scale: the factor by which its loss is multiplied under float16; None in other precisions and before the
            first step.
        compiled: what runs compiled so far: "gradient", "gradient with its graph" (which its curvature products need),
            the same "for what is read" (if the graph reaches nothing else), "product", "5 steps as one"; under autocast
            with the precision, as in "gradient in bfloat16".
        not_compiled: {what cannot be compiled: the reason}; "everything" for a problem that runs without compilation.
    """

    name: str
    level: int
    steps: int
    looks_ahead: bool
    through: tuple[str, ...]
    inner: tuple[str, ...]
    estimator: Estimator | None
    recorded: int
    graph_bytes: int | None
    loss_scale: float | None
    compiled: tuple[str, ...]
    not_compiled: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"level {self.level}  {self.name}: {_count(self.steps, 'step')} a round"]
        if self.through:
            ahead = ", after virtual steps of the problems below" if self.looks_ahead else ""
            lines.append(f"hypergradient through {', '.join(self.through)}{ahead}")
        if self.inner:
            lines.append(f"its curvature includes the steps of {', '.join(self.inner)}")
        if self.estimator is not None:
            lines.append(f"differentiated by {self.estimator!r}, with {_count(self.recorded, 'recorded step')} a round")
        if self.graph_bytes is not None:
            lines.append(f"graph, gradient and variables of a step: {self.graph_bytes / 2**20:.1f} MB")
        if self.loss_scale is not None:
            lines.append(f"loss scale: {self.loss_scale:g}")
        if self.compiled:
            lines.append(f"compiled: {', '.join(self.compiled)}")
        lines += [f"not compiled: {what} ({reason})" for what, reason in self.not_compiled.items()]
        return "\n    ".join(lines)


@dataclass(frozen=True)
class EngineReport:
    """The result of :meth:`mlo.Engine.report`. ``print`` shows it as text.

    Attributes:
        device: the device of the problems.
        lookahead: whether the top problems step after virtual steps of the others.
        inner_path: as the engine was given.
        compile: as the engine was given.
        capture: as the engine was given.
        replayed: how many rounds were replays of a recorded one.
        not_captured: why rounds are not recorded, if that is known.
        tf32: as the engine was given.
        problems: {name: its report}, lowest level first.
    """

    device: torch.device
    lookahead: bool
    inner_path: bool
    compile: bool
    capture: bool
    replayed: int
    not_captured: str | None
    tf32: bool | None
    problems: Mapping[str, ProblemReport]

    def __str__(self) -> str:
        names = ("lookahead", "inner_path", "compile", "capture", "tf32")
        flags = {name: getattr(self, name) for name in names}
        first = ", ".join([f"device={str(self.device)!r}", *(f"{flag}={value}" for flag, value in flags.items())])
        if self.capture:
            first += f"\nrounds replayed: {self.replayed}"
        if self.not_captured is not None:
            first += f"\nnot captured: {self.not_captured}"
        return "\n".join([first, *(str(problem) for problem in reversed(list(self.problems.values())))])


def engine_report(
    plan: Plan,
    levels: Mapping[str, Level],
    device: torch.device,
    inner_path: bool,
    captured: Captured | None,
    tf32: bool | None,
) -> EngineReport:
    """The report on the engine with these parts."""
    return EngineReport(
        device=device,
        lookahead=plan.lookahead,
        inner_path=inner_path,
        compile=any(level.compiler is not None for level in levels.values()),
        capture=captured is not None,
        replayed=0 if captured is None else captured.replayed,
        not_captured=None if captured is None else captured.obstacle,
        tf32=tf32,
        problems={
            name: _problem_report(level, number, plan) for number, (name, level) in enumerate(levels.items(), start=1)
        },
    )


def _problem_report(level: Level, number: int, plan: Plan) -> ProblemReport:
    name, problem = level.name, level.problem
    estimator = plan.estimators[name] if any(name in path for path in plan.paths.values()) else None
    taken = problem.steps_ahead if plan.lookahead and problem.steps_ahead else problem.steps
    ran, not_compiled = compiled.described(level)
    last = plan.recordings[name].last
    return ProblemReport(
        name=name,
        level=number,
        steps=problem.steps,
        looks_ahead=plan.lookahead and name in plan.tops,
        through=tuple(plan.paths[name]),
        inner=tuple(plan.inner.get(name, ())),
        estimator=estimator,
        recorded=0 if estimator is None else taken if last is None else min(last, taken),
        graph_bytes=level.graph_bytes,
        loss_scale=level.scale.value if level.scale is not None and problem.step_number else None,
        compiled=ran,
        not_compiled=not_compiled,
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
