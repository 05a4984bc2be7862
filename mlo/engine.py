"""The loop: which level steps when, on whose gradient, and what is recorded for the levels above."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlo.errors import CheckpointError, ConfigError, GraphError
from mlo.evaluation import Evaluator
from mlo.graph import Graph
from mlo.guard import Guard
from mlo.hypergradient.step import Record, copied, cotangents_of
from mlo.hypergradient.sweep import sweep, unreached
from mlo.memo import Memo
from mlo.optimizers import moment, virtual_step
from mlo.plan import Plan, place
from mlo.problem import Problem, State
from mlo.randomness import Randomness, global_state, replay, set_global_state
from mlo.vectors import Vector, filled

Callback = Callable[["Engine"], None]


class Engine:
    """Trains a stack of problems, each on its own loss, upper ones through the training of lower ones.

    A round (:meth:`step`) takes ``steps`` steps of every problem, lowest level first. With lookahead, the lower
    problems' steps are first taken virtually, the top ones step on what came of that, and the lower ones then take
    their steps for real, on the same batches, under the new top.

    Args:
        problems: lowest level first.
        hypergradient: the estimator for problems that do not carry their own: a registered name ("darts", "one_step",
            "cg", ...), a mapping {"kind": name, **options}, or a :class:`mlo.Response`.
        lookahead: None: as the estimators have it ("darts" on, the others off).
        device: "auto" (a CUDA card where there is one), or a torch device; modules are moved there once.

    Attributes:
        graph: who reads whom.
        rounds: rounds taken so far.
        losses: {problem: its loss at its last step}, detached, on the device.
        pullbacks: {problem: how often a sweep has pulled a cotangent back through it}.

    Raises:
        GraphError, ConfigError: if the problems do not fit together, with the remedy.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        hypergradient: object = "darts",
        *,
        lookahead: bool | None = None,
        device: str | torch.device = "auto",
    ) -> None:
        self._plan = Plan(problems, hypergradient, lookahead)
        self.problems: Mapping[str, Problem] = {problem.name: problem for problem in problems}
        self.device = place(problems, device)
        self.rounds = 0
        self.losses: dict[str, Tensor] = {}
        self.pullbacks: Counter[str] = Counter()
        self._evaluator = Evaluator(self.problems, self.device)
        self._guard = Guard(self.device, deferred=self.device.type != "cpu")
        self._reports: dict[str, Tensor] = {}

    @property
    def graph(self) -> Graph:
        """Who reads whom, level by level."""
        return self._plan.graph

    @property
    def passes(self) -> Mapping[str, Mapping[str, int]]:
        """{problem: {kind: forward passes of its module so far}}; see :class:`mlo.evaluation.Evaluator`."""
        return self._evaluator.passes

    def run(self, steps: int, callbacks: Iterable[Callback] = ()) -> None:
        """Take ``steps`` rounds, calling each callback with the engine after every one."""
        called = list(callbacks)
        for _ in range(steps):
            self.step()
            for callback in called:
                callback(self)
        self._guard.wait()

    def step(self) -> None:
        """Take one round.

        Raises:
            NonFiniteLossError: if a loss is NaN or infinite: that step is not taken, what came before it stands.
            GraphError: if a declared read carries no gradient.
        """
        due = [name for name, problem in self.problems.items() if self.rounds >= problem.warmup]
        tops = [name for name in self._plan.tops if name in due] if self._plan.lookahead else []
        for top in tops:
            for _ in range(self.problems[top].steps):
                states, records = self._rollout(top, due)
                self._real_step(top, states, records, uppers=())
        rest = [name for name in due if name not in tops]
        records = {}
        for position, name in enumerate(rest):
            later = [n for n in rest[position:] if self._plan.paths[n]]
            for again in reversed(range(self.problems[name].steps)):
                uppers = later[1:] if later[:1] == [name] and not again else later
                self._real_step(name, self._live_states(), records, uppers)
        self.rounds += 1
        self._guard.look()

    def hypergradient(self, name: str) -> dict[str, Tensor]:
        """The gradient that problem ``name`` would step on next: {parameter name: tensor of its shape}.

        The problems below it take their next steps virtually, on their next batches. Nothing changes: no parameter,
        buffer or optimizer state, no random state, no position in the data.

        Raises:
            ConfigError: if there is no such problem.
            GraphError: if a declared read carries no gradient.
        """
        if name not in self.problems:
            raise ConfigError(f"no problem is named {name!r}; there are {', '.join(map(repr, self.problems))}")
        with replay(None, self.device):
            states, records = self._rollout(name, list(self.problems))
            batch = self.problems[name].stream.peek()
            gradient = self._gradient(name, states, records, batch, "virtual", ()).own
        variables = self.problems[name].variables
        return dict(zip(variables, filled(gradient.values(), tuple(variables.values())), strict=True))

    def metrics(self) -> dict[str, float]:
        """The last losses as "<problem>/loss", and what estimators and problems report; waits for the device."""
        found = {f"{name}/loss": loss for name, loss in self.losses.items()} | self._reports
        for name, problem in self.problems.items():
            found |= {f"{name}/{key}": value for key, value in problem.metrics().items()}
        return {key: float(value) for key, value in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that it takes to go on to the bit: every problem's state, the round, the random state.

        Waits for the device, and raises a NonFiniteLossError rather than let a bad state be saved.
        """
        self._guard.wait()
        return {
            "rounds": self.rounds,
            "problems": {name: problem.state_dict() for name, problem in self.problems.items()},
            "random": global_state(),
            "cuda_random": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            CheckpointError: if it is of other problems, or one of them does not fit.
        """
        saved, mine = list(state["problems"]), list(self.problems)
        if saved != mine:
            raise CheckpointError(f"the checkpoint is of the problems {saved}, and the engine has {mine}")
        for name, problem in self.problems.items():
            problem.load_state_dict(state["problems"][name])
        self.rounds = state["rounds"]
        set_global_state(state["random"])
        if self.device.type == "cuda" and state["cuda_random"] is not None:
            torch.cuda.set_rng_state(state["cuda_random"].cpu(), self.device)

    def _live_states(self) -> dict[str, State]:
        return {name: problem.live_state() for name, problem in self.problems.items()}

    def _real_step(
        self, name: str, states: Mapping[str, State], records: dict[str, Record], uppers: Collection[str]
    ) -> None:
        """One step of a problem, recorded if the sweep of one of ``uppers`` will go through it."""
        problem = self.problems[name]
        batch = problem.stream.peek()
        targets = self._plan.targets(name, uppers)
        gradient = self._gradient(name, states, records, batch, "step", targets)
        keep = bool(targets) and self._plan.responses[name].needs_before
        before, at = (copied(states[name]), moment(problem)) if keep else (None, None)
        if uppers:
            for record in records.values():
                record.freeze(name)
        self._guard.update(problem, gradient.loss, gradient.own, gradient.buffers)
        problem.stream.next()
        self.losses[name] = gradient.loss
        if targets:
            records[name] = gradient.record(problem, before, states[name], at, batch, states)

    def _rollout(self, top: str, due: Collection[str]) -> tuple[dict[str, State], dict[str, Record]]:
        """The states that the next steps of the problems below ``top`` would lead to, and records of the last ones."""
        states = self._live_states()
        records: dict[str, Record] = {}
        below = [name for name in self.graph.names[: self.graph.names.index(top)] if name in due]
        with replay(None, self.device):
            for position, name in enumerate(below):
                problem, at = self.problems[name], moment(self.problems[name])
                uppers = [upper for upper in (*below[position:], top) if upper != name]
                for step in range(problem.steps):
                    batch, before, was = problem.stream.peek(step), states[name], at
                    targets = self._plan.targets(name, uppers) if step == problem.steps - 1 else ()
                    gradient = self._gradient(name, states, records, batch, "virtual", targets)
                    moved, at = virtual_step(problem, before.parameters, gradient.own, was)
                    after = State({**before.parameters, **moved}, gradient.buffers)
                    if targets:
                        records[name] = gradient.record(problem, before, after, was, batch, states)
                    states[name] = after
        return states, records

    def _gradient(
        self,
        name: str,
        states: Mapping[str, State],
        records: Mapping[str, Record],
        batch: Any,
        kind: str,
        targets: Collection[str],
    ) -> _Gradient:
        """The gradient of a problem's loss for its variables, through its best responses; ``targets``: see Record."""
        problem, paths = self.problems[name], self._plan.paths[name]
        lower = [read for read in self.graph.lower_reads(name) if read in paths]
        randomness = Randomness.capture(self.device)
        memo = Memo() if targets else None
        evaluation = self._evaluator.evaluate(
            name, states, batch, kind=kind, through={*lower, *targets}, memo=memo
        )  # fmt: skip
        variables = {n: [states[n].parameters[v] for v in self.problems[n].variables] for n in (name, *lower)}
        inputs = [v for n in variables for v in variables[n]]
        if memo is not None and lower:
            inputs += memo.leaves
        if not evaluation.loss.requires_grad:
            raise self._no_gradient(name)
        gradients = cotangents_of(inputs, torch.autograd.grad(evaluation.loss, inputs, allow_unused=True))
        if memo is not None and lower:
            gradients = memo.pull(gradients)
        own: list[Tensor | None] = [gradients.get(v) for v in variables[name]]
        if paths:
            cotangents = {}
            for read in lower:
                reached = [gradients.get(v) for v in variables[read]]
                if all(r is None for r in reached):
                    raise unreached(name, read)
                cotangents[read] = filled(reached, variables[read])
            swept = sweep(name, paths, cotangents, records, self._plan.responses, self._evaluator, self.pullbacks,
                          self._reports)  # fmt: skip
            own = _sum(own, swept)
        elif all(g is None for g in own):
            raise self._no_gradient(name)
        return _Gradient(
            evaluation.loss.detach(),
            dict(zip(problem.variables, own, strict=True)),
            evaluation.buffers,
            randomness,
            memo,
        )

    def _no_gradient(self, name: str) -> GraphError:
        if self.graph.is_upper(name) and not self._plan.paths[name]:
            return GraphError(
                f"problem {name!r}: with first_order nothing is differentiated through lower problems, and its loss "
                "does not depend directly on its own parameters; choose another estimator, such as 'one_step'"
            )
        return GraphError(
            f"problem {name!r}: no gradient of its loss reaches its own parameters; compute the loss from self(...)"
        )


@dataclass(frozen=True)
class _Gradient:
    """A problem's gradient at one state, with what a record of the step keeps of its evaluation."""

    loss: Tensor
    own: dict[str, Tensor | None]
    buffers: Mapping[str, Tensor]
    randomness: Randomness
    memo: Memo | None

    def record(
        self, problem: Problem, before: State | None, after: State, at: Any, batch: Any, states: Mapping[str, State]
    ) -> Record:
        reads = {read: states[read] for read in problem.node.reads}
        return Record(problem, before, after, self.own, at, batch, self.randomness, reads, self.memo)


def _sum(own: Sequence[Tensor | None], swept: Vector | None) -> list[Tensor | None]:
    if swept is None:
        return list(own)
    return [s if o is None else o + s for o, s in zip(own, swept, strict=True)]
