"""The training loop: which problem steps when, and which of its steps are recorded for the levels above."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mlo.errors import ConfigError
from mlo.levels.graph import Graph
from mlo.levels.problem import Problem
from mlo.levels.state import State, cast
from mlo.ops import distributed
from mlo.ops.compiler import Compiler
from mlo.ops.rng import Randomness, global_state, set_global_state
from mlo.ops.tf32 import Tf32
from mlo.ops.vectors import filled
from mlo.steps.level import Level, levels_of
from mlo.training.captured import Captured, refuse_capture
from mlo.training.checkpoint import with_other_processes
from mlo.training.commit import Updater
from mlo.training.devices import known_device, move_to
from mlo.training.finite import Watch
from mlo.training.gradients import Gradients, Hypergradient, Records
from mlo.training.outermost import look, outermost
from mlo.training.plan import Plan
from mlo.training.report import EngineReport, engine_report
from mlo.training.rounds import Rounds, cast_batches, looking_ahead
from mlo.training.skipped import Skipped
from mlo.training.state_checks import checked_state, load_problems

Callback = Callable[["Engine"], None]


class Engine:
    """Trains several problems, each on its own loss, and the upper ones through the training of the lower ones.

    A round (:meth:`step`) takes ``steps`` steps of every problem, lowest level first. With lookahead, the steps of the
    lower problems are first taken virtually, and the top problems step on the result. Then the lower problems take
    their real steps, on the same batches, with the updated top problems.

    Args:
        problems: the problems, lowest level first.
        hypergradient: the estimator for problems without their own: a registered name ("darts", "one_step", "cg", ...),
            a mapping {"kind": name, **options}, or an :class:`mlo.Estimator`.
        lookahead: whether to use lookahead; None: the default of the estimators ("darts" uses it, the others do not).
        inner_path: with three or more levels, whether the curvature of a middle problem includes the path of its own
            gradient through lower problems. True is exact; False leaves it out, which is common, and warns.
        compile: whether to compile gradients and curvature products with torch.compile. Compilation takes seconds to
            minutes, so it pays off after thousands of rounds. The first pass of each problem runs uncompiled, so errors
            in a loss show a normal traceback. A problem that cannot be compiled leads to a warning and runs uncompiled.
        capture: whether to record whole rounds as CUDA graphs and replay them, which saves the launching of kernels one
            by one (:class:`mlo.training.captured.Captured`). Losses may not depend on Python objects that change from
            round to round. Rounds that cannot be recorded lead to a warning and are taken as usual. Only on a GPU.
        tf32: whether float32 convolutions and matrix products of steps may use TensorFloat-32 on a GPU; None: as torch
            is set. Curvature products, and passes whose graph these use, never do.
        device: a torch device, or "auto" for a CUDA GPU if there is one. Modules are moved there once.
        non_finite: what a NaN or infinity in a step does: "stop": an error; "skip": its round is undone.

    Attributes:
        inner_path, tf32: as given.
        rounds: number of rounds taken so far.
        losses: {problem: its loss at its last step}, detached scalar tensors on the device.

    Raises:
        GraphError, ConfigError: if problems or options are invalid; the message says what to write instead.
    """

    def __init__(
        self,
        problems: Problem | Iterable[Problem],
        hypergradient: object = "one_step",
        *,
        lookahead: bool | None = None,
        inner_path: bool = False,
        compile: bool = False,
        capture: bool = False,
        tf32: bool | None = None,
        device: str | torch.device = "auto",
        non_finite: str = "stop",
    ) -> None:
        either, three = (True, False), (True, False, None)
        flags = {"lookahead": (lookahead, three), "compile": (compile, either), "capture": (capture, either)}
        flags["tf32"] = tf32, three
        for option, (value, kinds) in flags.items():
            if value not in kinds:
                raise ConfigError(f"{option}={value!r}; pass {' or '.join(map(str, kinds))}")
        problems = [problems] if isinstance(problems, Problem) else list(problems)
        self._plan = Plan(problems, hypergradient, lookahead, inner_path)
        if capture:
            refuse_capture(known_device(device))
        self.inner_path, self.rounds = inner_path, 0
        self.problems: Mapping[str, Problem] = {problem.name: problem for problem in problems}
        watched = {problem.name: Watch(problem) for problem in problems}  # before they are on a GPU
        self.device = move_to(problems, device)
        self._plan.checks.run()
        self.tf32, self._tf32 = tf32, Tf32(tf32, self.device.type == "cuda")
        compiler = Compiler(self.device, rounds_captured=capture) if compile else None
        self._levels = levels_of(problems, self.device, compiler, self._tf32, self._plan.modes)
        self._gradients = Gradients(self._plan, self._levels)
        self._updater = Updater(self.device, deferred=self.device.type != "cpu")
        self._updater.watched = watched
        self._rounds = Rounds(self._plan, self._levels, self._gradients, self._updater)
        self._skipped = Skipped(non_finite, self.problems, self._rounds, self._gradients, self._updater)
        parts = self._levels, self._rounds, self._gradients, self._updater
        self._captured = Captured(*parts) if capture else None

    @property
    def losses(self) -> Mapping[str, Tensor]:
        """{problem: the loss of its last real step}, detached, on the device."""
        return self._rounds.losses

    @property
    def graph(self) -> Graph:
        """Which problem reads which, level by level."""
        return self._plan.graph

    @property
    def passes(self) -> Mapping[str, Mapping[str, int]]:
        """{problem: {kind: forward passes of its module so far}}; see :class:`mlo.steps.level.Level`."""
        return {name: level.passes for name, level in self._levels.items()}

    @property
    def pullbacks(self) -> Mapping[str, int]:
        """{problem: how often a cotangent was pulled back through it}."""
        return self._gradients.pullbacks

    def report(self) -> EngineReport:
        """A printable report: for each problem its estimator, its recorded steps, and what runs compiled.

        It changes nothing. Some entries (memory of graphs, loss scales, what can be compiled) are only known after the
        first rounds.
        """
        return engine_report(self._plan, self._levels, self.device, self.inner_path, self._captured, self.tf32)

    def run(self, steps: int, callbacks: Iterable[Callback] = ()) -> None:
        """Take ``steps`` rounds. After each, call every callback with the engine."""
        if type(steps) is not int or steps < 0:
            raise ConfigError(f"steps={steps!r}; pass a whole number of rounds, 0 or more")
        called = list(callbacks)
        for _ in range(steps):
            self.step()
            for callback in called:
                callback(self)
        self._updater.wait()
        self._gradients.numbers()

    @outermost
    def step(self) -> None:
        """Take one round.

        Raises:
            NonFiniteLossError: if a loss or gradient is NaN or infinite. That step is not taken, but all before it are.
            GraphError: if a declared read carries no gradient.
        """
        due = self._due()
        one_round = partial(self._round, due)
        self._skipped.take(one_round if self._captured is None else partial(self._captured.take, one_round, due), due)
        self.rounds += 1
        self._updater.check_arrived()

    def _round(self, due: list[str]) -> None:
        rest, tops = due, list[str]()
        if self._plan.lookahead:
            tops = [name for name in self._plan.tops if name in due]
            rest = [name for name in due if name not in tops]
        for top in tops:
            for _ in range(self.problems[top].steps):
                with self._ahead(top):
                    self._rounds.after_virtual(top, due, self._live_states())
        states, records = self._live_states(), Records()
        for position, name in enumerate(rest):
            self._rounds.real(name, states, records, rest[position + 1 :])

    @look
    def hypergradient(self, name: str, dtype: torch.dtype | None = None) -> Hypergradient:
        """The gradient of the next step of problem ``name``: {parameter name: tensor of its shape}.

        Its attribute ``metrics`` has what the estimators report of it, such as {"<problem>/residual": number}.
        The problems below it take their next steps virtually, on their next batches, with the current learning rates.
        The run is not changed: not its parameters, buffers, optimizer states, random state or position in the data.

        Args:
            name: an upper problem; for a lower one, the result is its ordinary gradient.
            dtype: the precision of copies of all floating-point tensors; None: that of the tensors. In float64, a loss
                computes all in float64, even where it asks for less.

        Raises:
            ConfigError: if there is no such problem.
            GraphError: if a declared read carries no gradient.
        """
        with self._ahead(name), self._rounds.trial(self._level(name), dtype):
            states, records, batches = self._next(name, {}, dtype)
            count, self._gradients.latest = self.problems[name].step_number, {}
            found = self._gradients.of(name, states, records, batches, "virtual", (), count).own
        tensors = dict(zip(self.problems[name].variables, filled(found, states[name].variables), strict=True))
        return Hypergradient(tensors, self._gradients.numbers())

    @look
    def objective(
        self, name: str, parameters: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The loss of problem ``name`` at its next step, after the next steps of the problems below it.

        This is the function whose gradient :meth:`hypergradient` estimates, with the same random state. The run is not
        changed.

        Args:
            name: a problem.
            parameters: {parameter name: tensor} to use instead of its own parameters.
            dtype: as for :meth:`hypergradient`.

        Returns:
            A scalar tensor without a graph.
        """
        with self._ahead(name), self._rounds.trial(self._level(name), dtype):
            states, _, batches = self._next(name, parameters or {}, dtype)
            return distributed.average([self._gradients.loss(name, states, batches)])[0]

    def _next(
        self, name: str, parameters: Mapping[str, Tensor], dtype: torch.dtype | None
    ) -> tuple[dict[str, State], Records, tuple[Any, ...]]:
        """The states before the next step of ``name``, the records of the virtual steps to them, and its batches."""
        states = self._live_states()
        if parameters:
            states[name] = self.problems[name].state_with(parameters)
        if dtype is not None:
            states = {n: cast(state, dtype) for n, state in states.items()}
        due = {*self._due(), *self._plan.paths[name]}
        states, records = self._rounds.below(name, due, states, dtype)
        return states, records, cast_batches(self.problems[name].batches_ahead(), dtype)

    def _level(self, name: str) -> Level:
        if name not in self._levels:
            raise ConfigError(f"no problem is named {name!r}; the problems are {', '.join(map(repr, self.problems))}")
        return self._levels[name]

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """The last losses, as "<problem>/loss", and the metrics of estimators and problems. It waits for the device."""
        self._gradients.numbers()
        found = {f"{name}/loss": loss for name, loss in self.losses.items()} | self._gradients.reports
        for name, problem in self.problems.items():
            found |= {f"{name}/{key}": value for key, value in problem.metrics().items()}
        return {key: float(value) for key, value in found.items()} | self._skipped.metrics()

    def state_dict(self) -> dict[str, Any]:
        """The state needed to resume bit for bit: all problems, the number of rounds, and the random state.

        As in torch, it refers to the live tensors: save it with :func:`mlo.checkpoint.save`, or ``copy.deepcopy`` it.
        It synchronizes with the device, and raises a NonFiniteLossError instead of returning an invalid state. In a
        distributed run all processes must call it, and all get the same result.
        """
        self._updater.wait()
        return with_other_processes(self._own_state() | self._skipped.state_dict())

    def _own_state(self) -> dict[str, Any]:
        """The state of this process."""
        return {
            "rounds": self.rounds,
            "problems": {name: problem.state_dict() for name, problem in self.problems.items()},
            "levels": {name: level.state_dict() for name, level in self._levels.items()},
            "losses": dict(self.losses),
            **self._gradients.state_dict(),
            "random": global_state(),
            "cuda_random": Randomness.capture(self.device).cuda,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned: with all of it, or, after an error, with nothing of it.

        Raises:
            CheckpointError: if the state is not one of these problems; it names the part that is missing or wrong.
        """
        state = checked_state(state, self._own_state(), self.problems)
        load_problems(self.problems, state["problems"])
        self.rounds = state["rounds"]
        self._skipped.load_state_dict(state)
        for name, level in self._levels.items():
            level.load_state_dict(state["levels"][name])
        self._rounds.losses = {name: loss.to(self.device) for name, loss in state["losses"].items()}
        self._gradients.load_state_dict(state, self.device)
        set_global_state(state["random"])
        if state["cuda_random"] is not None:
            Randomness(torch.get_rng_state(), state["cuda_random"].cpu()).restore(self.device)

    def _ahead(self, name: str) -> AbstractContextManager[None]:
        """A context for the steps that ``name`` is differentiated through; they are virtual if it uses lookahead."""
        below = [problem for n, problem in self.problems.items() if n != name]
        return looking_ahead(below, self._plan.lookahead and name in self._plan.tops)

    def _due(self) -> list[str]:
        return [name for name, problem in self.problems.items() if self.rounds >= problem.warmup]

    def _live_states(self) -> dict[str, State]:
        return {name: problem.live_state() for name, problem in self.problems.items()}
