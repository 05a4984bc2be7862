"""The loop: which level steps when, on whose gradient, and what is recorded for the levels above."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from mlo.errors import CheckpointError, ConfigError
from mlo.hypergradient.step import Record
from mlo.levels.graph import Graph
from mlo.levels.problem import Problem, State
from mlo.ops import distributed
from mlo.ops.autocast import outside_autocast
from mlo.ops.compiler import Compiler
from mlo.ops.loss_scale import LossScale
from mlo.ops.rng import global_state, replay, set_global_state
from mlo.ops.vectors import filled
from mlo.steps.evaluation import Evaluator
from mlo.steps.optimizer import optimizer_state
from mlo.training.checkpoint import of_this_process, with_other_processes
from mlo.training.gradients import Gradient, Gradients, Records
from mlo.training.plan import Plan, place
from mlo.training.report import EngineReport, engine_report
from mlo.training.update import Updater
from mlo.training.virtual_steps import Rollout, cast_batches, cast_state, looking_ahead

Callback = Callable[["Engine"], None]


class Engine:
    """Trains a stack of problems, each on its own loss, upper ones through the training of lower ones.

    A round (:meth:`step`) takes ``steps`` steps of every problem, lowest level first. With lookahead, the lower
    problems' steps are first taken virtually, the top ones step on what came of that, and the lower ones then take
    their steps for real, on the same batches, under the new top.

    Args:
        problems: lowest level first.
        hypergradient: the estimator for problems that do not carry their own: a registered name ("darts", "one_step",
            "cg", ...), a mapping {"kind": name, **options}, or a :class:`mlo.Estimator`.
        lookahead: None: as the estimators have it ("darts" on, the others off).
        inner_path: where a middle problem's own gradient runs through a lower one, let its curvature include that path
            (exact), rather than leave it out (usual, with a warning).
        compile: run whole gradient passes and curvature products through torch.compile. It pays after thousands of
            rounds: each kind of pass takes seconds to minutes to compile. The first pass of each problem is
            taken without; a problem that cannot be compiled is warned of, with the reason, and runs as it is.
        device: "auto" (a CUDA card where there is one), or a torch device; modules are moved there once.

    Attributes:
        graph: who reads whom.
        inner_path: as given.
        rounds: rounds taken so far.
        losses: {problem: its loss at its last step}, detached, on the device.

    Raises:
        GraphError, ConfigError: if the problems do not fit together, with the remedy.
    """

    def __init__(
        self,
        problems: Problem | Iterable[Problem],
        hypergradient: object = "one_step",
        *,
        lookahead: bool | None = None,
        inner_path: bool = False,
        compile: bool = False,
        device: str | torch.device = "auto",
    ) -> None:
        flags = {"lookahead": (lookahead, (True, False, None)), "compile": (compile, (True, False))}
        for option, (value, kinds) in flags.items():
            if value not in kinds:
                raise ConfigError(f"{option}={value!r}; pass {' or '.join(map(str, kinds))}")
        problems = [problems] if isinstance(problems, Problem) else list(problems)
        self._plan = Plan(problems, hypergradient, lookahead, inner_path)
        self.inner_path = inner_path
        self.problems: Mapping[str, Problem] = {problem.name: problem for problem in problems}
        self.device = place(problems, device)
        self.rounds = 0
        self.losses: dict[str, Tensor] = {}
        self._evaluator = Evaluator(self.problems, self.device, Compiler(self.device) if compile else None)
        self._gradients = Gradients(self._plan, self._evaluator)
        self._rollout = Rollout(self._plan, self._evaluator, self._gradients)
        self._updater = Updater(self.device, deferred=self.device.type != "cpu")

    @property
    def graph(self) -> Graph:
        """Who reads whom, level by level."""
        return self._plan.graph

    @property
    def passes(self) -> Mapping[str, Mapping[str, int]]:
        """{problem: {kind: forward passes of its module so far}}; see :class:`mlo.steps.evaluation.Evaluator`."""
        return self._evaluator.passes

    @property
    def pullbacks(self) -> Mapping[str, int]:
        """{problem: how often a sweep has pulled a cotangent back through it}."""
        return self._gradients.pullbacks

    def report(self) -> EngineReport:
        """How this engine trains each problem: its estimator, what is recorded, what is compiled; print it to read it.

        It takes no step and changes nothing. What is learned on the way (memory of graphs, loss scales, what can be
        compiled) is there once the steps that show it were taken.
        """
        return engine_report(self._plan, self._evaluator, self._gradients, self.inner_path)

    def run(self, steps: int, callbacks: Iterable[Callback] = ()) -> None:
        """Take ``steps`` rounds, calling each callback with the engine after every one."""
        if type(steps) is not int or steps < 0:
            raise ConfigError(f"steps={steps!r}; pass a whole number of rounds, 0 or more")
        called = list(callbacks)
        for _ in range(steps):
            self.step()
            for callback in called:
                callback(self)
        self._updater.wait()

    @outside_autocast
    def step(self) -> None:
        """Take one round.

        Raises:
            NonFiniteLossError: if a loss is NaN or infinite: that step is not taken, what came before it stands.
            GraphError: if a declared read carries no gradient.
        """
        due = self._due()
        tops = [name for name in self._plan.tops if name in due] if self._plan.lookahead else []
        for top in tops:
            for _ in range(self.problems[top].steps):
                with self._ahead(top):
                    states, records = self._rollout.below(top, due, self._live_states())
                    self._real_step(top, states, records)
        rest = [name for name in due if name not in tops]
        states, records = self._live_states(), Records()
        for position, name in enumerate(rest):
            self._real_steps(name, states, records, [n for n in rest[position + 1 :] if self._plan.paths[n]])
        self.rounds += 1
        self._updater.look()

    @outside_autocast
    def hypergradient(self, name: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The gradient that problem ``name`` would step on next: {parameter name: tensor of its shape}.

        The problems below it take their next steps virtually, on their next batches, at the present learning rates.
        Nothing of the run changes: no parameter, buffer or optimizer state, no random state, no position in the data.

        Args:
            name: an upper problem (for a lower one it is the plain gradient).
            dtype: computed in this precision, from copies of all floating-point tensors; None: as they are.

        Raises:
            ConfigError: if there is no such problem.
            GraphError: if a declared read carries no gradient.
        """
        with self._ahead(name), replay(None, self.device, self._evaluator.draws_outside((name,))):
            states, records, batches = self._next(name, {}, dtype)
            gradient = self._gradients.of(name, states, records, batches, "virtual", ()).own
        variables = [states[name].parameters[v] for v in self.problems[name].variables]
        return dict(zip(gradient, filled(gradient.values(), variables), strict=True))

    @outside_autocast
    def objective(
        self, name: str, parameters: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The loss that problem ``name`` would have next, after the next steps of the problems below it.

        It is the function whose gradient :meth:`hypergradient` estimates, as the same random state gives it; nothing
        changes.

        Args:
            name: a problem.
            parameters: {parameter name: tensor} in place of its own.
            dtype: as for :meth:`hypergradient`.

        Returns:
            A scalar, without a graph.
        """
        losses = []
        with self._ahead(name), replay(None, self.device, self._evaluator.draws_outside((name,))):
            states, _, batches = self._next(name, parameters or {}, dtype)
            for batch in batches:
                evaluation = self._evaluator.evaluate(name, states, batch, kind="virtual")
                losses.append(evaluation.loss.detach())
                states[name] = State(states[name].parameters, evaluation.buffers, states[name].live)
        return distributed.average([torch.stack(losses).mean()])[0]

    def _next(
        self, name: str, parameters: Mapping[str, Tensor], dtype: torch.dtype | None
    ) -> tuple[dict[str, State], Records, tuple[Any, ...]]:
        """The states in which ``name`` would take its next step, the records of the steps there, and its batches."""
        if name not in self.problems:
            raise ConfigError(f"no problem is named {name!r}; there are {', '.join(map(repr, self.problems))}")
        states = self._live_states()
        unknown = [n for n in parameters if n not in states[name].parameters]
        if unknown:
            raise ConfigError(f"problem {name!r} has no parameter {', '.join(map(repr, unknown))}")
        if parameters:
            moved = {n: p.detach().requires_grad_() for n, p in parameters.items()}
            states[name] = State({**states[name].parameters, **moved}, states[name].buffers)
        if dtype is not None:
            states = {n: cast_state(state, dtype) for n, state in states.items()}
        due = {*self._due(), *self._plan.paths[name]}
        states, records = self._rollout.below(name, due, states, dtype)
        return states, records, cast_batches(self.problems[name].batches_ahead(), dtype)

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """The last losses as "<problem>/loss", and what estimators and problems report; waits for the device."""
        found = {f"{name}/loss": loss for name, loss in self.losses.items()} | self._gradients.reports
        for name, problem in self.problems.items():
            found |= {f"{name}/{key}": value for key, value in problem.metrics().items()}
        return {key: float(value) for key, value in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that it takes to go on to the bit: every problem's state, the round, the random state.

        As in torch, its tensors are the live ones: save it (:func:`mlo.checkpoint.save`), or ``copy.deepcopy`` it.

        Waits for the device, and raises a NonFiniteLossError rather than let a bad state be saved. Of several
        processes all call it, and all get the same.
        """
        self._updater.wait()
        state = {
            "rounds": self.rounds,
            "problems": {name: problem.state_dict() for name, problem in self.problems.items()},
            "warm": {upper: {n: list(v) for n, v in warm.items()} for upper, warm in self._gradients.warm.items()},
            "scales": {name: [scale.value, scale.passes] for name, scale in self._gradients.scales.items()},
            "evaluator": self._evaluator.state_dict(),
            "losses": dict(self.losses),
            "reports": dict(self._gradients.reports),
            "random": global_state(),
            "cuda_random": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        return with_other_processes(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            CheckpointError: if it is of other problems, or one of them does not fit.
        """
        if "problems" not in state:
            raise CheckpointError(f"this is no state of an engine; it holds {', '.join(map(str, state)) or 'nothing'}")
        saved, mine = list(state["problems"]), list(self.problems)
        if saved != mine:
            raise CheckpointError(f"the checkpoint is of the problems {saved}, and the engine has {mine}")
        state = of_this_process(state)
        for name, problem in self.problems.items():
            problem.load_state_dict(state["problems"][name])
        self.rounds = state["rounds"]
        self._gradients.warm = {
            upper: {name: tuple(part.to(self.device) for part in solution) for name, solution in warm.items()}
            for upper, warm in state["warm"].items()
        }
        self._evaluator.load_state_dict(state["evaluator"])
        self._gradients.scales = {name: LossScale(*scale) for name, scale in state["scales"].items()}
        self.losses = {name: loss.to(self.device) for name, loss in state["losses"].items()}
        self._gradients.reports = {key: value.to(self.device) for key, value in state["reports"].items()}
        set_global_state(state["random"])
        if self.device.type == "cuda" and state["cuda_random"] is not None:
            torch.cuda.set_rng_state(state["cuda_random"].cpu(), self.device)

    def _ahead(self, name: str) -> AbstractContextManager[None]:
        """Inside, the problems below ``name`` step as it sees them: virtually, where it is one that looks ahead."""
        below = [problem for n, problem in self.problems.items() if n != name]
        return looking_ahead(below, self._plan.lookahead and name in self._plan.tops)

    def _due(self) -> list[str]:
        return [name for name, problem in self.problems.items() if self.rounds >= problem.warmup]

    def _live_states(self) -> dict[str, State]:
        return {name: problem.live_state() for name, problem in self.problems.items()}

    def _real_step(
        self,
        name: str,
        states: Mapping[str, State],
        records: Records,
        targets: Collection[str] = (),
        freeze: bool = False,
    ) -> Gradient:
        """One step of a problem, remembered for a pullback onto ``targets``.

        With ``freeze``, ``records`` are still needed after it, and keep copies of what it is about to change.
        """
        problem = self.problems[name]
        gradient = self._gradients.of(name, states, records, problem.batches_ahead(), "step", targets)
        if freeze:
            for record in itertools.chain.from_iterable(records.values()):
                record.freeze(name)
        self._updater.update(problem, gradient.loss, gradient.own, gradient.buffers)
        problem.advance()
        self.losses[name] = gradient.loss
        return gradient

    def _real_steps(self, name: str, states: Mapping[str, State], records: Records, later: Sequence[str]) -> None:
        """A problem's steps of one round; recorded if a sweep of one of ``later`` will go through them."""
        problem, estimator = self.problems[name], self._plan.estimators[name]
        targets = self._plan.targets(name, later)
        recorded: list[Record] = []
        for left in reversed(range(problem.steps)):
            keep = bool(targets) and estimator.records(left)
            keeps = keep and estimator.needs_before
            at = optimizer_state(problem, copies=self._gradients.needs_optimizer_state(name)) if keeps else None
            stored = (None, None) if at is None else estimator.stored(states[name], at, len(recorded))
            onto = targets if keep and self._gradients.kept_for_pullback(name, len(recorded), left) else ()
            seen = self._gradients.seen(name, states, stored[0]) if onto else states
            gradient = self._real_step(name, seen, records, onto, freeze=bool(later or left))
            if keep:
                fresh = problem.batches_ahead() if estimator.takes_fresh_batches else ()
                recorded.append(gradient.record(problem, *stored, states[name], states, fresh))
        if targets:
            records[name] = recorded
