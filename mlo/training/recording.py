"""The parts of a round that a CUDA graph does not contain: its batches, learning rates, and work on the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_flatten, tree_unflatten

from mlo.levels.batch_trees import opened
from mlo.levels.batches import Batches
from mlo.levels.problem import Problem
from mlo.ops.rng import gpu_state, set_gpu_state
from mlo.ops.vectors import copy_, readable
from mlo.steps.level import Level
from mlo.steps.optimizer import hyperparameters
from mlo.training.commit import Updater
from mlo.training.gradients import Gradients
from mlo.training.rounds import Rounds

#: values that a recording holds fixed, and that are compared by ``==``
PLAIN = (bool, int, float, complex, str, type(None), np.generic)


class HeldBatches:
    """The batches of one problem in a round, each in tensors that stay where they are.

    Attributes:
        device: see :class:`mlo.levels.batches.Batches`.
    """

    def __init__(self, stream: Batches) -> None:
        self.device = stream.device
        self._stream, self._asked, self._position = stream, set[int](), 0
        self._held: dict[int, tuple[list[Any], Any]] = {}

    def peek(self, ahead: int = 0) -> Any:
        """The batch that :meth:`next` will return after ``ahead`` more calls, from the held tensors if it is there."""
        at = self._position + ahead
        if at in self._held:
            return tree_unflatten(*self._held[at])
        self._asked.add(at)
        return self._stream.peek(at)

    def next(self) -> Any:
        """The next batch."""
        batch = self.peek()
        self._position += 1
        return batch

    def move(self, kept: bool = True) -> None:
        """Go on in the data as far as the round went, or (if not ``kept``) forget how far that was."""
        for _ in range(self._position if kept else 0):
            self._stream.next()
        self._position = 0

    def fill(self) -> bool:
        """Copy the next batches into these tensors. Return whether they have the same form."""
        for at in self._asked:
            parts, form = tree_flatten(opened(self._stream.peek(at)))
            if at not in self._held:
                self._held[at] = [p.clone() if _is_copied(p) else p for p in parts], form
                continue
            held, held_form = self._held[at]
            if form != held_form or not all(map(_same_form, held, parts)):
                return False
            for mine, new in zip(held, parts, strict=True):
                if _is_copied(mine):
                    mine.copy_(new, non_blocking=True)
        return True

    def generators(self) -> list[torch.Generator]:
        """As of the data."""
        return self._stream.generators()

    def state_dict(self) -> dict[str, Any]:
        """As of the data."""
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As of the data."""
        self._stream.load_state_dict(state)


class Rates:
    """The learning rates of all steps in a round, as tensors on the device, and the schedulers that set them.

    Args:
        levels: those that step.
    """

    def __init__(self, levels: Mapping[str, Level]) -> None:
        self._held = {name: _RatesOfProblem(level) for name, level in levels.items()}

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """A context in which a round is recorded with these tensors."""
        with ExitStack() as stack:
            for held in self._held.values():
                stack.enter_context(held.on_device())
            yield

    def fill(self) -> list[str]:
        """Set the tensors to the learning rates of the next steps, and the schedulers to where a round leaves them.

        Returns:
            The problems whose schedulers change other options, too. Then no scheduler has moved.
        """
        others = [name for name, held in self._held.items() if not held.fill()]
        if others:
            self.undo()
        return others

    def undo(self) -> None:
        """Set the schedulers and the optimizers' options to where they were before the last :meth:`fill`."""
        for held in self._held.values():
            held.undo()


class _RatesOfProblem:
    def __init__(self, level: Level) -> None:
        self._problem, self._number = level.problem, 0
        double = any([v.dtype in (torch.float64, torch.complex128) for v in self._problem.variables.values()])
        zero = torch.zeros((), dtype=torch.float64 if double else torch.float32, device=level.device)
        # of each step, and after the last one
        self._rates = [[zero.clone() for _ in self._groups] for _ in range(self._problem.steps + 1)]

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self._problem.optimizer.param_groups  # load_state_dict makes new ones

    def step(self) -> None:
        """Called as a scheduler after each step of the recorded round."""
        self._number += 1
        self._set(self._rates[self._number])

    @contextmanager
    def on_device(self) -> Iterator[None]:
        problem, numbers = self._problem, [group["lr"] for group in self._groups]
        scheduler, problem.scheduler, self._number = problem.scheduler, cast(LRScheduler, self), 0
        self._set(self._rates[0])
        try:
            yield
        finally:
            self._set(numbers)
            problem.scheduler = scheduler

    def fill(self) -> bool:
        scheduler = self._problem.scheduler
        self._options = hyperparameters(self._problem)
        self._state = None if scheduler is None else deepcopy(scheduler.state_dict())
        fixed = fixed_options(self._problem)
        for index, rates in enumerate(self._rates):
            if index and scheduler is not None:
                scheduler.step()
                if fixed_options(self._problem) != fixed:
                    return False
            for group, rate in zip(self._groups, rates, strict=True):
                if isinstance(group["lr"], Tensor):
                    rate.copy_(group["lr"])
                else:
                    rate.fill_(group["lr"])
        return True

    def undo(self) -> None:
        if self._problem.scheduler is not None and self._state is not None:
            self._problem.scheduler.load_state_dict(self._state)
        for group, options in zip(self._groups, self._options, strict=True):
            for key, value in options.items():
                if isinstance(value, Tensor):
                    group[key].copy_(value)
                else:
                    group[key] = value

    def _set(self, rates: Sequence[float | Tensor]) -> None:
        for group, rate in zip(self._groups, rates, strict=True):
            group["lr"] = rate


class Draws:
    """The random numbers of a recorded round: its replays draw those that usual rounds would draw in their place.

    A graph's numbers are at fixed offsets from the state of the generator at a replay. This state moves on as far as
    the recording did. If that is not at all, because all numbers were drawn by evaluations that were undone or are
    repeated later, torch would not tell the graph the state. Then the recording moves it, and a replay undoes this.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._undone = device, False

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """A context in which the round is recorded."""
        begin = gpu_state(self._device)
        yield
        end = gpu_state(self._device)
        if begin is not None and end is not None and begin.tolist() == end.tolist():
            self._undone = True
            torch.rand((), device=self._device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """A context in which the round is replayed."""
        before = gpu_state(self._device) if self._undone else None
        yield
        if before is not None:
            set_gpu_state(before, self._device)


class Host:
    """What a round does on the host besides its kernels: kept while it is recorded, and done once for each replay."""

    def __init__(self, levels: Mapping[str, Level], rounds: Rounds, gradients: Gradients, updater: Updater) -> None:
        self._levels, self._rounds, self._gradients, self._updater = levels, rounds, gradients, updater
        self._problems = {name: level.problem for name, level in levels.items()}
        self._warm = {upper: dict(warm) for upper, warm in gradients.warm.items()}

    def carry(self) -> None:
        """Copy the warm starts of the next round to where the recorded one read them."""
        warm = self._gradients.warm
        for upper, vectors in self._warm.items():
            for name, vector in vectors.items():
                if warm[upper][name] is not vector:
                    copy_(vector, warm[upper][name])
        self._gradients.warm = {**self._warm}

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A context in which a round is recorded; the counters are as before afterwards."""
        updater, gradients, losses, reports = (
            self._updater,
            self._gradients,
            self._rounds.losses,
            self._gradients.reports,
        )
        steps = {name: problem.step_number for name, problem in self._problems.items()}
        passes = {name: level.passes.copy() for name, level in self._levels.items()}
        pullbacks, waiting = gradients.pullbacks.copy(), len(updater.waiting)
        self._rounds.losses, gradients.reports, updater.recorded = {}, {}, True
        try:
            yield
        finally:
            updater.recorded = False
            self._losses, self._reports = self._rounds.losses, gradients.reports
            self._rounds.losses, gradients.reports, gradients.warm = losses, reports, {**self._warm}
            self._seen = [s._replace(step=s.step - steps[s.problem]) for s in updater.waiting[waiting:]]
            del updater.waiting[waiting:]
            self._steps = {name: problem.step_number - steps[name] for name, problem in self._problems.items()}
            self._passes = {name: level.passes - passes[name] for name, level in self._levels.items()}
            self._pullbacks = gradients.pullbacks - pullbacks
            for name, problem in self._problems.items():
                problem.step_number = steps[name]
                self._levels[name].passes = passes[name]
            gradients.pullbacks = pullbacks

    def follow(self) -> None:
        """Count the steps of a round, and move on in the data."""
        for seen in self._seen:
            self._updater.waiting.append(seen._replace(step=self._problems[seen.problem].step_number + seen.step))
        for name, problem in self._problems.items():
            problem.step_number += self._steps[name]
            self._levels[name].passes += self._passes[name]
            for _ in range(self._steps[name] * problem.accumulate):
                problem.stream.next()
        self._gradients.pullbacks += self._pullbacks
        self._rounds.losses = {**self._rounds.losses, **{name: loss.clone() for name, loss in self._losses.items()}}
        self._gradients.reports |= {key: value.clone() for key, value in self._reports.items()}


def fixed_options(problem: Problem) -> list[dict[str, Any]]:
    """The options of each parameter group of the problem's optimizer, other than those that a replay takes anew."""
    groups = problem.optimizer.param_groups
    return [{key: _value(option) for key, option in group.items() if key not in _MOVING} for group in groups]


_MOVING = frozenset(("params", "lr", "initial_lr"))


def _value(option: Any) -> Any:
    if not isinstance(option, Tensor):
        return option
    return option.tolist() if readable(option) else option.data_ptr()


def _is_copied(part: Any) -> bool:
    """Whether a part of a batch is copied to where it was recorded. A copy of a sparse tensor makes new memory."""
    return isinstance(part, Tensor) and part.layout is torch.strided


def _same_form(one: Any, other: Any) -> bool:
    """Whether a round that was recorded with one part of a batch can be replayed with another."""
    if _is_copied(one) and _is_copied(other):
        return bool(one.shape == other.shape and one.dtype == other.dtype)
    return one is other or (type(one) is type(other) and isinstance(one, PLAIN) and one == other)
