"""Real steps: of a problem's own optimizer, or of several steps of torch's SGD in one graph."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from mlo.hypergradient.step import Record, copied
from mlo.levels.problem import Problem, State
from mlo.steps.evaluation import Evaluator
from mlo.steps.optimizer_state import OptimizerState, optimizer_state
from mlo.training.checked_updates import Updater
from mlo.training.gradients import Gradient, Gradients, Records
from mlo.training.plan import Plan
from mlo.training.virtual_steps import Rollout

_GLOBAL_HOOKS = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)  # which live as long as torch


class RealSteps:
    """Takes real steps for an engine.

    Attributes:
        losses: {problem: the loss of its last real step}, detached, on the device.
    """

    def __init__(
        self, plan: Plan, evaluator: Evaluator, gradients: Gradients, rollout: Rollout, updater: Updater
    ) -> None:
        self._plan, self._evaluator, self._gradients = plan, evaluator, gradients
        self._rollout, self._updater = rollout, updater
        self._problems = evaluator.problems
        self.losses: dict[str, Tensor] = {}

    def step(
        self,
        name: str,
        states: Mapping[str, State],
        records: Records,
        targets: Collection[str] = (),
        freeze: bool = False,
    ) -> Gradient:
        """One real step of a problem, whose gradient keeps what a pullback onto ``targets`` needs.

        With ``freeze``, ``records`` are still needed afterwards, so they keep copies of what the step changes.
        """
        problem = self._problems[name]
        gradient = self._gradients.of(name, states, records, problem.batches_ahead(), "step", targets)
        if freeze:
            for record in itertools.chain.from_iterable(records.values()):
                record.freeze(name)
        self._updater.update(problem, gradient.loss, gradient.own, gradient.buffers)
        problem.advance()
        self.losses[name] = gradient.loss
        return gradient

    def steps(self, name: str, states: Mapping[str, State], records: Records, following: Sequence[str]) -> None:
        """The steps of a problem in one round; recorded if one of the ``following`` is differentiated through them."""
        problem, estimator = self._problems[name], self._plan.estimators[name]
        later = [n for n in following if self._plan.paths[n]]
        targets = self._plan.targets(name, later)
        recorded: list[Record] = []
        step = taken = 0  # steps taken, and how many of them are recorded
        while (left := problem.steps - step) > 0:
            keep = bool(targets) and estimator.records(left - 1)
            count = self._gradients.at_once(name, states, taken, left) if keep and self._can_join(problem) else 0
            if count and (record := self._joined_steps(name, states, count, targets, later, following)) is not None:
                recorded.append(record)
                step, taken = step + count, taken + count
                continue
            keeps = keep and estimator.needs_before
            at = optimizer_state(problem, copies=self._gradients.needs_optimizer_state(name)) if keeps else None
            stored = (None, None) if at is None else estimator.stored(states[name], at, taken)
            onto = targets if keep and self._gradients.kept_for_pullback(name, taken, left - 1) else ()
            seen = self._gradients.seen(name, states, stored[0]) if onto else states
            gradient = self.step(name, seen, records, onto, freeze=bool(later) or left > 1)
            if keep:
                fresh = problem.batches_ahead() if estimator.takes_fresh_batches else ()
                record = gradient.record(problem, *stored, states[name], states, fresh)
                if at is not None and self._gradients.needs_only_state_after(name):
                    slots = optimizer_state(problem, copies=False).slots
                    record.optimizer_state = OptimizerState(at.groups, slots, stepped=True)
                recorded.append(record)
            step, taken = step + 1, taken + keep
        if targets:
            records[name] = recorded

    def _can_join(self, problem: Problem) -> bool:
        """Whether several real steps may be one graph: nothing of the user's runs between them, nor compiled code."""
        optimizer = problem.optimizer
        hooks = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks, *_GLOBAL_HOOKS]
        hooks += [variable._backward_hooks for variable in problem.variables.values()]
        overridden = problem.scheduler is not None or "step" in vars(optimizer)
        return not overridden and not any(hooks) and self._evaluator.compiler is None

    def _joined_steps(
        self,
        name: str,
        states: Mapping[str, State],
        count: int,
        targets: Collection[str],
        later: Sequence[str],
        following: Sequence[str],
    ) -> Record | None:
        """Several real steps in one graph, and their record; None if they can only be taken one by one.

        The graph must outlive what changes before its last use, so it is made with copies of it: of the problem's own
        tensors, and of those that are stepped on before, or while, the last of ``later`` is differentiated.
        """
        problem, before = self._problems[name], self._evaluator.capture(name)
        last = later[-1]
        changed = {name, *following[: following.index(last)], *([last] if self._problems[last].steps > 1 else [])}
        seen = {n: copied(state) if n in changed and state.live else state for n, state in states.items()}
        batches = [problem.batches_ahead(index) for index in range(count)]
        at = optimizer_state(problem)
        segment = None
        try:
            done = self._rollout.at_once(name, seen, batches, at, targets, "step")
            segment = None if done is None else done[0].segment
            if done is None or segment is None or not self._updater.commit(problem, segment):
                segment = None
                return None  # taken one by one, the step that fails raises its error
        finally:
            if segment is None:
                before.restore(self._evaluator.device)
        problem.steps_taken += count
        for _ in range(count):
            problem.advance()
        self.losses[name] = segment.losses[-1]
        done[0].after = states[name]
        return done[0]
