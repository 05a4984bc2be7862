"""The steps of a round: real ones, and virtual ones, which change nothing; and what is recorded of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from operator import is_not
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mlo.errors import NonFiniteLossError
from mlo.levels.batch_trees import opened
from mlo.levels.problem import Problem
from mlo.levels.state import Slots, State, cast, copied, in_precision
from mlo.ops.float64 import in_float64
from mlo.ops.rng import Randomness, replay
from mlo.steps.evaluation import MicroBatch
from mlo.steps.level import Level
from mlo.steps.optimizer import Groups, hyperparameters, is_linear, needs_only_after, virtual_step
from mlo.steps.point import Point
from mlo.steps.step import NOT_STORED, Step
from mlo.training.commit import Updater
from mlo.training.gradients import Gradients, Records, Taken
from mlo.training.plan import Plan
from mlo.training.round import Round, held_copies, how_many, in_one_graph


@contextmanager
def looking_ahead(problems: Iterable[Problem], really: bool = True) -> Iterator[None]:
    """A context in which the problems' attribute ``looking_ahead`` is True (if ``really``)."""
    affected = list(problems)
    for problem in affected:
        problem.looking_ahead = really
    try:
        yield
    finally:
        for problem in affected:
            problem.looking_ahead = False


class Rounds:
    """Takes the steps of rounds for an engine.

    Attributes:
        losses: {problem: the loss of its last real step}, detached, on the device.
    """

    def __init__(self, plan: Plan, levels: Mapping[str, Level], gradients: Gradients, updater: Updater) -> None:
        self._plan, self._levels, self._gradients, self._updater = plan, levels, gradients, updater
        self.losses: dict[str, Tensor] = {}
        self._virtual: list[tuple[Problem, int, Tensor]] = []  # the virtual steps below one top, and their losses
        self._top: str | None = None
        dtypes = {v.dtype.to_real() for each in levels.values() for v in each.problem.variables.values()}
        self._precision = min(dtypes, key=lambda dtype: torch.finfo(dtype).bits)

    @contextmanager
    def trial(self, level: Level, dtype: torch.dtype | None) -> Iterator[None]:
        """A context for the next step of a level that is not taken: the random state is as before afterwards."""
        if dtype is not None:  # the data make their batches as for any other step
            for each in (level, *[self._levels[name] for name in level.below]):
                each.problem.batches_ahead(each.problem.steps_now)
        with replay(None, level.device, level.draws_outside), in_float64(dtype, self._precision):
            yield

    def below(
        self, top: str, due: Collection[str], states: Mapping[str, State], dtype: torch.dtype | None = None
    ) -> tuple[dict[str, State], Records]:
        """The states that the next steps of the problems below ``top`` lead to, and records of those steps.

        Args:
            due: the problems that step.
            states: of all problems, to begin with.
            dtype: of the floating-point tensors in ``states``, if it is another than the modules'.
        """
        reached, records, self._virtual = dict(states), Records(), []
        names = self._plan.graph.names
        below = [name for name in names[: names.index(top)] if name in due]
        if self._plan.lookahead:  # other tops step by themselves, not below this one
            below = [name for name in below if name not in self._plan.tops]
        level = self._levels[top]
        with replay(None, level.device, any([self._levels[name].draws_outside for name in below])):
            for position, name in enumerate(below):
                of = self._levels[name]
                _, targets = self._plan.targets(name, (*below[position + 1 :], top))
                reached[name] = _virtual(reached[name], of.problem.optimizer_slots(), dtype)
                self._steps(
                    Round(of, self._plan.roles[name], reached, records, targets, of.problem.steps_now, dtype=dtype)
                )
        return reached, records

    def real(self, name: str, states: dict[str, State], records: Records, following: Sequence[str]) -> None:
        """The real steps of a problem; recorded if one of the ``following`` is differentiated through them."""
        problem = self._levels[name].problem
        (later, targets), changing = self._plan.targets(name, tuple(following)), set[str]()
        if later:  # what is stepped on before, or while, the last of them is differentiated
            last = later[-1]
            changing = {*following[: following.index(last)]}
            changing |= {last} if self._levels[last].problem.steps > 1 else set()
        self._steps(
            Round(
                self._levels[name],
                self._plan.roles[name],
                states,
                records,
                targets,
                problem.steps,
                changing,
                real=True,
            )
        )

    def after_virtual(self, top: str, due: Collection[str], states: Mapping[str, State]) -> None:
        """One real step of a top problem, after virtual steps of the problems below it.

        Raises:
            NonFiniteLossError: for the first of these steps in which something is not finite.
        """
        reached, records = self.below(top, due, states)
        of = Round(self._levels[top], self._plan.roles[top], reached, records, (), 1, real=True)
        if self._updater.deferred:
            self._updater.note(self._virtual, reached)
        try:
            self._one(of, 0, 0, keep=False)
        except NonFiniteLossError:
            with self.watched(top):
                self.below(top, due, states)
            raise

    @contextmanager
    def watched(self, top: str) -> Iterator[None]:
        """A context in which each virtual step before one of ``top`` is checked by itself."""
        self._top = top
        try:
            yield
        finally:
            self._top = None

    def _steps(self, of: Round) -> None:
        last, recorded = of.role.recording.last, list[Step]()
        index = taken = 0  # steps taken, and of these recorded
        while index < of.total:
            left = of.total - index
            keep = bool(of.targets) and (last is None or left <= last)
            count = how_many(of, taken, left) if keep and of.role.joins and self._top is None else 0
            step = self._joined(of, index, count) if count else None
            if step is None:
                count, step = 1, self._one(of, index, taken, keep)
            if step is not None:
                recorded.append(step)
                taken += count
            index += count
        for step in recorded:
            step.solution = of.states[of.level.name]
        if of.targets:
            of.records[of.level.name] = recorded

    def _one(self, of: Round, index: int, taken: int, keep: bool) -> Step | None:
        """One step by itself; its record, if that is to be kept.

        Args:
            index, taken: how many steps of the round came before it, and how many of them were recorded.
        """
        level, problem, role, ahead = of.level, of.level.problem, of.role, 0 if of.real else index
        states, left = of.states, of.total - index - 1
        batches, count = problem.batches_ahead(ahead), problem.step_number + ahead
        kind = "step" if of.real else "virtual"
        if of.dtype is not None:
            batches = cast_batches(batches, of.dtype)
        if not keep:
            found = self._gradients.of(level.name, states, of.records, batches, kind, (), count)
            self._move(of, found, hyperparameters(problem) if not of.real else (), count)
            return None
        groups = hyperparameters(problem)
        linear = is_linear(problem, groups)
        only_after = not linear and role.recording.last == 1 and not role.again and needs_only_after(problem, groups)
        before = self._stored(of, taken, linear, only_after) if role.recording.before else NOT_STORED
        onto = of.targets if left == 0 or self._keeps(of, taken) else ()
        if of.changing:
            states = {**states, **held_copies(of)}
        if onto and role.keeps_graph and before.variables and role.recording.store_on == "device":
            states = {**states, level.name: before}
        found = self._gradients.of(level.name, states, of.records, batches, kind, onto, count, later=index > 0)
        self._move(of, found, groups, count)
        if only_after and before.variables:
            slots = problem.optimizer_slots() if of.real else of.states[level.name].slots
            before = before._replace(slots=slots)
        step = Step(found.point._replace(state=before), groups, linear, stepped=only_after)
        if found.kept:
            step.gradient = found.own
        if not all(map(is_not, found.own, repeat(None))):
            step.unreached = frozenset([i for i, each in enumerate(found.own) if each is None])
        step.base, step.graph = found.base, found.graph
        if role.recording.fresh:
            fresh = cast_batches(problem.batches_ahead(0 if of.real else index + 1), of.dtype)
            again = zip(found.point.micro, fresh, strict=True)
            step.fresh = tuple([m._replace(batch=batch, buffers=None, scale=1.0) for m, batch in again])
        return step

    def _stored(self, of: Round, taken: int, linear: bool, only_after: bool) -> State:
        """What is kept of the state before a step."""
        role, state = of.role, of.states[of.level.name]
        if taken % role.recording.every:
            return NOT_STORED
        slots = of.level.problem.optimizer_slots() if of.real else state.slots
        if only_after:
            slots = ()
        elif linear and not role.again and any(slots):  # only their presence matters
            slots = tuple([{k: None if v is None else True for k, v in slot.items()} for slot in slots])
        state = state._replace(slots=slots)
        if role.recording.store_on == "cpu":
            return copied(state, torch.device("cpu"))
        return copied(state) if of.real else state

    def _move(self, of: Round, found: Taken, groups: Groups, count: int) -> None:
        """Take the optimizer's step: really, or to another state."""
        name, problem = of.level.name, of.level.problem
        if not of.real:
            self._virtual.append((problem, count, found.loss))
            if self._top is not None:
                watch = self._updater.watched[name]
                watch.refuse(problem, found.loss, found.own, found.buffers, count, self._top)
            of.states[name] = virtual_step(problem, of.states[name]._replace(buffers=found.buffers), found.own, groups)
            return
        self._updater.update(problem, found.loss, found.own, found.buffers)
        problem.advance()
        self.losses[name] = found.loss

    def _keeps(self, of: Round, taken: int) -> bool:
        """Whether the graph of a step that is not the last one is kept: while memory lasts for it."""
        size = of.level.graph_bytes  # known once a last step's graph was kept
        return size is not None and of.role.keeps_graph and (taken + 1) * size <= of.role.recording.graph_bytes

    def _joined(self, of: Round, index: int, count: int) -> Step | None:
        """Several steps in one graph, and their record; None if they can only be taken one by one.

        Their batches may not be of one form, and so have no common code; or a step's loss may reach none of the
        variables; or, in real steps, a loss may not be finite.

        The graph must outlive what changes before its last use, so it is made with copies of it.
        """
        level, problem, name = of.level, of.level.problem, of.level.name
        states, groups = {**of.states, **held_copies(of)}, hyperparameters(problem)
        if of.real:
            states[name] = copied(of.states[name]._replace(slots=problem.optimizer_slots()))
        ahead = 0 if of.real else index
        batches = [cast_batches(problem.batches_ahead(ahead + i), of.dtype)[0] for i in range(count)]
        before, first = Randomness.capture(level.device), problem.step_number
        done = None
        problem.step_number = first + ahead
        try:
            done = in_one_graph(of, states, batches, groups)
            problem.step_number = first
            if done is not None and of.real and not self._updater.commit(problem, done):
                done = None  # taken one by one, the step that fails raises its error
        finally:
            problem.step_number = first
            if done is None:  # it may have drawn random numbers before it failed
                before.restore(level.device)
        if done is None:
            return None
        micro = MicroBatch(batches[-1], before)
        reads = {read: states[read] for read in level.reads}
        number = first + ahead + count - 1
        if of.real:
            problem.step_number = first + count
            for _ in range(count):
                problem.advance()
            self.losses[name] = done.losses[-1]
        else:
            self._virtual += [(problem, first + ahead + i, loss) for i, loss in enumerate(done.losses)]
            end = done.end
            slots = tuple([{k: v if v is None else v.detach() for k, v in slot.items()} for slot in end.slots])
            variables = tuple([v.detach().requires_grad_() for v in end.variables])
            of.states[name] = State(variables, end.constants, end.buffers, slots)
        return Step(Point(level, states[name], reads, (micro,), number), groups, linear=True, joined=done)


def _virtual(state: State, slots: Slots, dtype: torch.dtype | None) -> State:
    """The state that virtual steps begin with: aliases of the variables, since the steps are not of the module."""
    variables = tuple([v.detach().requires_grad_(v.requires_grad) for v in state.variables])
    cast_slots = slots if dtype is None else cast(State((), slots=slots), dtype).slots
    return state._replace(variables=variables, slots=cast_slots, live=False)


def cast_batches(batches: tuple[Any, ...], dtype: torch.dtype | None) -> tuple[Any, ...]:
    """The batches with floating-point and complex tensors in the precision of ``dtype``."""
    if dtype is None:
        return batches
    return tuple([tree_map_only(Tensor, partial(in_precision, dtype=dtype), opened(batch)) for batch in batches])
