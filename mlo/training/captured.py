"""Whole rounds as CUDA graphs: recorded once, and replayed with the batches and learning rates of each round."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from mlo.errors import ConfigError
from mlo.ops import distributed, torch_versions
from mlo.ops.rng import Randomness
from mlo.steps.level import Level
from mlo.steps.own_step import has_torch_step
from mlo.training.commit import Updater
from mlo.training.gradients import Gradients
from mlo.training.problem_checks import hooks_of
from mlo.training.recording import PLAIN, Draws, HeldBatches, Host, Rates, fixed_options
from mlo.training.rounds import Rounds

#: records the kernels of a function without running them, and returns what runs them
Record = Callable[[Callable[[], None]], Callable[[], None]]
USUAL_ROUNDS = 2  # with nothing changed between them, before one is recorded: the first makes and measures things
MOST_CHANGES = 20  # one after another, after which a warning says why nothing is replayed


def cuda_graph(function: Callable[[], None]) -> Callable[[], None]:
    """Record a function as a CUDA graph; what is returned replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def refuse_capture(device: torch.device) -> None:
    """Raise a ConfigError where rounds cannot be captured at all."""
    if device.type != "cuda":
        raise ConfigError(f"capture=True needs a CUDA GPU, and the device is {str(device)!r}; pass capture=False")
    if distributed.world() > 1:
        raise ConfigError("capture=True works in one process; pass capture=False under torchrun")


class Captured:
    """Takes the rounds of an engine: replays a recorded round where nothing has changed that a recording holds fixed.

    A recording holds fixed: which problems step, all hyperparameters but the learning rates, numbers and flags among
    the attributes of problems and modules, which passes are compiled, and where parameters, buffers and optimizer
    states are in memory. After a change, rounds are taken as usual, and then recorded again. A round whose batches have
    other shapes, or whose schedulers change more than learning rates, is taken as usual, and the recording is kept.

    Attributes:
        replayed: how many rounds were replayed.
        obstacle: why no round can be recorded; None if nothing is known of that.
    """

    def __init__(
        self,
        levels: Mapping[str, Level],
        rounds: Rounds,
        gradients: Gradients,
        updater: Updater,
        record: Record = cuda_graph,
    ) -> None:
        self._levels, self._rounds, self._gradients, self._updater = levels, rounds, gradients, updater
        self._record, self._device = record, next(iter(levels.values())).device
        self._fixed: dict[str, Any] = {}
        self._usual = self._changes = self.replayed = 0
        self._batches: dict[str, HeldBatches] = {}
        self._rates = Rates({})
        self._replay: Callable[[], None] | None = None
        self.obstacle: str | None = None

    def take(self, one_round: Callable[[], None], due: Sequence[str]) -> None:
        """Take a round, as ``one_round`` does."""
        if self.obstacle is not None:
            one_round()
            return
        warm = {upper: tuple(warm) for upper, warm in self._gradients.warm.items()}
        fixed = {"which problems step": tuple(due), "warm starts": warm} | _fixed(self._levels)
        if fixed != self._fixed:
            self._forget(fixed)
        if self._usual < USUAL_ROUNDS:
            self._take_as_usual(one_round)
        elif changed := self._fill():
            self._not_replayed(changed)
            one_round()
        elif self._replay is None:
            self._capture(one_round)
        else:
            self._replay()
            self._changes = 0
            self.replayed += 1

    def _forget(self, fixed: dict[str, Any]) -> None:
        """What a recording would hold fixed has changed."""
        self._not_replayed([name for name, value in fixed.items() if self._fixed.get(name) != value])
        self._fixed, self._usual, self._replay = fixed, 0, None
        self._batches = {name: HeldBatches(level.problem.stream) for name, level in self._levels.items()}
        self._rates = Rates({name: self._levels[name] for name in fixed["which problems step"]})

    def _fill(self) -> list[str]:
        """Prepare batches and learning rates for a recorded round. If that cannot be, return what has changed."""
        changed = [f"batches of {name!r}" for name, batches in self._batches.items() if not batches.fill()]
        if not changed:
            changed = [f"options that the scheduler of {name!r} sets" for name in self._rates.fill()]
        return changed

    def _not_replayed(self, changed: Sequence[str]) -> None:
        self._changes += 1
        if self._changes == MOST_CHANGES:
            warnings.warn(f"no round is replayed, because of changes: {', '.join(changed)}", stacklevel=7)

    def _take_as_usual(self, one_round: Callable[[], None]) -> None:
        """Take a round without a recording, and find out whether one can be recorded, and which batches it takes."""
        before = self._random_states()
        with self._streams(go_on=True):
            one_round()
        self._usual += 1
        for obstacle in self._obstacles(before):
            self._refuse(obstacle)
            break

    def _obstacles(self, before: tuple[Any, Any]) -> Iterator[str]:
        """Why rounds like the one just taken cannot be recorded."""
        cpu, gpu = self._random_states()
        if cpu != before[0]:
            yield "a loss draws random numbers on the CPU; draw them with torch, on the GPU"
        if gpu != before[1] and not torch_versions.RECORDS_DRAWS:
            yield f"a loss draws random numbers, which torch {torch.__version__} cannot record; install torch 2.10"
        for name, level in self._levels.items():
            optimizer = level.problem.optimizer
            if level.scale is not None:
                yield f"the loss scale of {name!r}, for float16, depends on values; use torch.bfloat16"
            if level.problem.asks_total:
                yield f"the loss of {name!r} asks for steps_taken, which a recording would hold fixed"
            if not _on_device(optimizer):
                kind, able = type(optimizer).__name__, "capturable" in optimizer.defaults
                why = "counts its steps on the CPU; make it with" if able else "may read values on the CPU; it has no"
                yield f"{kind} of {name!r} {why} capturable=True"
            if hooks_of(level.problem, level.problem.module.modules()):
                yield f"{name!r} has hooks, which a replayed round would not call"

    def _capture(self, one_round: Callable[[], None]) -> None:
        """Record a round, and take it."""
        host, rates = Host(self._levels, self._rounds, self._gradients, self._updater), self._rates
        draws = Draws(self._device)

        def recorded() -> None:
            with draws.recorded():
                one_round()
            host.carry()

        before = self._random_states()
        try:
            with self._streams(go_on=False), rates.on_device(), host.kept(), _nothing_compiled(self._levels):
                replay = self._record(recorded)
        except RuntimeError as error:  # of whatever cannot be part of a CUDA graph
            rates.undo()
            self._refuse(f"a round cannot be recorded: {error}")
            one_round()
            return
        except BaseException:
            rates.undo()
            raise

        def again() -> None:
            host.carry()
            with draws.replayed():
                replay()
            host.follow()

        again()  # recording alone computes nothing
        self._changes = 0
        for obstacle in self._obstacles(before):
            self._refuse(obstacle)
            return
        self._replay = again

    def _refuse(self, obstacle: str) -> None:
        self.obstacle, compiler = obstacle, next(iter(self._levels.values())).compiler
        if compiler is not None:
            compiler.capture_functions()
        instead = "" if compiler is None else ", only compiled passes"
        warnings.warn(f"rounds are not captured{instead}: {obstacle}", stacklevel=7)

    def _random_states(self) -> tuple[Any, Any]:
        """Of the CPU and of the GPU; such that they can be compared."""
        randomness = Randomness.capture(self._device, outside=True)
        state, gpu = randomness.portable(), randomness.cuda
        cpu = state["torch"].tolist(), state["numpy"][1].tolist(), state["python"][1].tolist()
        return cpu, None if gpu is None else gpu.tolist()

    @contextmanager
    def _streams(self, go_on: bool) -> Iterator[None]:
        """A context in which the problems read ``self._batches``; afterwards they ``go_on`` in the data, or do not."""
        problems = {name: level.problem for name, level in self._levels.items()}
        own = {name: problem.stream for name, problem in problems.items()}
        for name, problem in problems.items():
            problem.stream = self._batches[name]
        try:
            yield
        finally:
            for name, problem in problems.items():
                problem.stream = own[name]
                self._batches[name].move(go_on)


def _nothing_compiled(levels: Mapping[str, Level]) -> AbstractContextManager[Any]:
    """A context in which compiled functions run only if they need not be compiled again, which a recording forbids."""
    compiles = any([level.compiler is not None for level in levels.values()])
    return torch.compiler.set_stance("fail_on_recompile") if compiles else nullcontext()


def _fixed(levels: Mapping[str, Level]) -> dict[str, Any]:
    """What a recording holds fixed, under names for messages."""
    found: dict[str, Any] = {}
    for name, level in levels.items():
        found["settings of TensorFloat-32"] = level.tf32.settings
        if (compiler := level.compiler) is not None:
            found["compiled functions"] = set(compiler.ran), set(compiler.failed), set(compiler.refused)
        problem, optimizer = level.problem, level.problem.optimizer
        held = [*problem.module.parameters(), *problem.module.buffers()]
        held += [v for slot in optimizer.state.values() for v in slot.values() if isinstance(v, Tensor)]
        attributes = {k: v for k, v in vars(problem).items() if k != "step_number" and isinstance(v, PLAIN)}
        found[f"options of the optimizer of {name!r}"] = fixed_options(problem)
        found[f"hooks of {name!r}"] = hooks_of(problem, problem.module.modules())
        found[f"attributes of {name!r}"] = attributes
        found[f"attributes of the module of {name!r}"] = [
            (key, value)
            for module in problem.module.modules()
            for key, value in vars(module).items()
            if isinstance(value, PLAIN)
        ]
        found[f"tensors of {name!r}"] = [(tensor.data_ptr(), tensor.requires_grad) for tensor in held]
    return found


def _on_device(optimizer: Optimizer) -> bool:
    """Whether the optimizer's step reads nothing on the host but numbers that a recording may hold fixed."""
    if type(optimizer) is SGD and has_torch_step(optimizer):
        return True
    return all([group.get("capturable") or group.get("fused") for group in optimizer.param_groups])
