"""One level of an engine: a problem, what it reads, and what has been found out about its loss."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mlo.levels.problem import Problem
from mlo.levels.state import State
from mlo.ops.compiler import Compiler
from mlo.ops.derivatives import Mode
from mlo.ops.differentiable import TwiceDifferentiable
from mlo.ops.loss_scale import LossScale
from mlo.ops.rng import outside_state, same_outside
from mlo.ops.tf32 import Tf32
from mlo.steps.autograd_graph import leaves_of
from mlo.steps.operators import Operators

_NOTHING_ELSE = nullcontext()


class Level:
    """A problem as its engine sees it.

    Attributes:
        problem, name: the problem, and its name.
        device: of all problems.
        compiler: compiles passes; None: they run eagerly.
        tf32: TensorFloat-32 of the engine's passes.
        reads: {name: level}, of the problems that its loss reads.
        below: the names of the problems below it.
        arguments: {parameter of the loss: problem}.
        passes: {kind: forward passes of the module}; kinds are "step" (a real step), "virtual" (a step of lookahead),
            "product" (a curvature product), "recompute" and "read" (another problem's loss read it).
        depends_on: the problems read of which it is known that the loss depends on them.
        graph_bytes: memory of what is kept of a step in a graph: the graph, the gradient, and the variables that it was
            taken at; None until one was kept.
        reaches_all: whether that gradient reached all variables.
        draws_outside: whether the loss may draw from NumPy's or Python's generators: until it has not, once.
        scale: of the loss, under float16.
        searched: whether its loss was searched for what :meth:`warn_of_strays` warns of.
        repeats: whether its loss may be evaluated more often than once for each step.
        writes_nothing: whether a first evaluation of its loss was seen to write into no parameters.
        modes: how products differentiate its gradient; empty if nothing does.
        seen: whether the operators of its loss are known.
        operators: what is done for them.
    """

    def __init__(
        self,
        problem: Problem,
        device: torch.device,
        compiler: Compiler | None,
        tf32: Tf32,
        modes: frozenset[Mode] = frozenset(),
    ) -> None:
        self.problem, self.name, self.device, self.compiler = problem, problem.name, device, compiler
        self.tf32 = tf32
        self.reads: dict[str, Level] = {}
        self.below: frozenset[str] = frozenset()
        self.arguments: dict[str, Problem] = {}
        self.passes: Counter[str] = Counter()
        self.depends_on: set[str] = set()
        self.graph_bytes: int | None = None
        self.reaches_all = False
        self.draws_outside = True
        self.scale = LossScale() if problem.autocast is torch.float16 else None
        self.searched = self.repeats = self.writes_nothing = False
        self.modes, self.seen, self.operators = modes, False, Operators()

    def differentiable(self, again: bool) -> AbstractContextManager[Any]:
        """A context for an evaluation of its loss, with operators that have the derivatives it needs.

        Args:
            again: whether its gradient will be differentiated.
        """
        known = self.operators
        return TwiceDifferentiable(known.elementary) if again or known.twice else _NOTHING_ELSE

    def note_graph(self, size: int, gradients: Sequence[Tensor | None]) -> None:
        """After gradients were kept with their graph, which takes this many bytes besides states and batch."""
        self.reaches_all = all([gradient is not None for gradient in gradients])
        variables = sum([v.numel() * v.element_size() for v in self.problem.variables.values()])
        self.graph_bytes = size + 2 * variables

    def count(self, kind: str, calls: Sequence[int]) -> None:
        """Count the module calls of an evaluation: its own, and those of each problem read."""
        self.passes[kind] += calls[0]
        for read, number in zip(self.reads.values(), calls[1:], strict=True):
            read.passes["read"] += number

    def recast(self, state: State) -> bool:
        """Whether ``state`` is in another precision than the module."""
        return any([a.dtype != b.dtype for a, b in zip(state.variables, self.problem.variables.values(), strict=True)])

    def compiles(self, state: State) -> bool:
        """Whether passes are compiled if possible; not in another precision, nor before one pass has run eagerly."""
        if self.compiler is None or self.draws_outside or self.name in self.compiler.refused:
            return False
        return not self.recast(state)

    def note_draws(self, before: tuple[Any, Any]) -> None:
        """After an evaluation: whether it drew from NumPy's or Python's generators since ``before``."""
        if same_outside(before, outside_state()):
            self.draws_outside = False
        elif self.compiler is not None and self.name not in self.compiler.refused:
            self.compiler.refuse(self.name, "its loss draws from NumPy's or Python's random generator; use torch's")

    def warn_of_strays(self, loss: Tensor, states: Mapping[str, State]) -> None:
        """Warn of a loss that uses a module's own parameters instead of the substituted ones."""
        self.searched = True
        used = {id(p) for state in states.values() for p in (*state.variables, *state.constants)}
        levels = {self.name: self, **self.reads}
        own = {
            id(p): f"{v!r} of the module of {n!r}" for n, at in levels.items() for v, p in at.problem.variables.items()
        }
        strays = sorted(own[i] for i in leaves_of(loss) if i in own and i not in used)
        if not strays:
            return
        reason = f"its loss uses {', '.join(strays)} directly, which is treated as a constant"
        warnings.warn(f"problem {self.name!r}: {reason}; call the problem, or use its .params[name]", stacklevel=2)
        if self.compiler is not None:
            self.compiler.refuse(self.name, reason)

    def state_dict(self) -> dict[str, Any]:
        """What decides how later passes are run."""
        scale = None if self.scale is None else [self.scale.value, self.scale.passes]
        known = {"draws_outside": self.draws_outside, "graph_bytes": self.graph_bytes, "reaches_all": self.reaches_all}
        return {**known, "scale": scale, "asks_steps_taken": self.problem.asks_steps_taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self.draws_outside, self.graph_bytes = state["draws_outside"], state["graph_bytes"]
        self.reaches_all, self.problem.asks_steps_taken = state["reaches_all"], state["asks_steps_taken"]
        self.scale = None if state["scale"] is None else LossScale(*state["scale"])


def levels_of(
    problems: Sequence[Problem],
    device: torch.device,
    compiler: Compiler | None,
    tf32: Tf32,
    modes: Mapping[str, frozenset[Mode]] = {},
) -> dict[str, Level]:
    """The levels of an engine by name, lowest first."""
    levels = {
        problem.name: Level(problem, device, compiler, tf32, modes.get(problem.name, frozenset()))
        for problem in problems
    }
    names = list(levels)
    for index, level in enumerate(levels.values()):
        level.below, level.repeats = frozenset(names[:index]), len(names) > 1
        level.reads = {read: levels[read] for read in level.problem.node.reads}
        level.arguments = {argument: levels[read].problem for argument, read in level.problem.arguments.items()}
    return levels
