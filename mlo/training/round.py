"""The steps of one level in a round, and several of them taken in one graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlo.levels.state import State, copied
from mlo.steps import compiled
from mlo.steps.level import Level
from mlo.steps.optimizer import Groups, is_linear
from mlo.steps.scan import Joined, steps_of
from mlo.training.gradients import Records
from mlo.training.plan import Role


class Round(NamedTuple):
    """The steps of one level in a round.

    Attributes:
        level: the level that steps.
        role: what the estimators make of them.
        states: of all levels; its own becomes the one that the steps lead to.
        records: of the levels below.
        targets: the problems that its steps are pulled back onto.
        total: how many steps.
        changing: the problems whose own tensors change before the last pullback.
        real: whether the steps are real.
        dtype: that batches are cast to; None: as they are.
    """

    level: Level
    role: Role
    states: dict[str, State]
    records: Records
    targets: Collection[str]
    total: int
    changing: Collection[str] = ()
    real: bool = False
    dtype: torch.dtype | None = None


def held_copies(of: Round) -> dict[str, State]:
    """Copies of what a step reads and what changes before it is pulled back."""
    found = {}
    for name in of.states if of.role.inner else of.level.reads:  # inner steps may read any level
        if name in of.changing:
            found[name] = copied(of.states[name])
    return found


def how_many(of: Round, taken: int, left: int) -> int:
    """How many of a level's next steps are recorded as one, in one graph; 0: the next one is recorded alone."""
    level, role, recording = of.level, of.role, of.role.recording
    problem, size = level.problem, level.graph_bytes
    if size is None or not role.joins or problem.accumulate > 1:
        return 0
    if not is_linear(problem, problem.optimizer.param_groups):
        return 0
    state = of.states[level.name]
    if not all([variable.requires_grad for variable in state.variables]) or (of.real and not _can_join(level)):
        return 0
    room = recording.graph_bytes / max(size, 1)
    return compiled.may_join(level, state, left if room >= taken + left else int(room) - taken)


def in_one_graph(of: Round, states: Mapping[str, State], batches: Sequence[Any], groups: Groups) -> Joined | None:
    """Steps of torch's SGD on one batch each, in one graph; None if they can only be taken one by one."""
    level, own = of.level, states[of.level.name]
    variables = tuple([variable.detach().requires_grad_() for variable in own.variables])
    slots = tuple(
        [{k: v.detach().requires_grad_() if isinstance(v, Tensor) else v for k, v in s.items()} for s in own.slots]
    )
    start = own._replace(variables=variables, slots=slots, live=False)
    at = {name: states[name]._replace(slots=(), live=False) for name in level.reads} | {level.name: start}
    reached = set(of.targets)
    with level.differentiable(again=True):
        if not of.real and level.compiles(own):
            done = compiled.steps(level, at, batches, groups, reached)
        else:
            done = steps_of(level, at, batches, groups, reached, counts=True)
    if done is None or not done[2]:
        return None
    _, end, _, losses, calls = done
    level.count("step" if of.real else "virtual", calls)
    return Joined(start, end, losses)


def _can_join(level: Level) -> bool:
    """Whether several real steps may be one graph: nothing of the user's runs between them, nor compiled code."""
    overridden = level.problem.scheduler is not None or "step" in vars(level.problem.optimizer)
    return not overridden and level.compiler is None
