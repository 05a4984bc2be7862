"""Parameters that a module or a loss writes into while it runs: found, put back and refused.

A training loop evaluates a loss once for each step. Here virtual steps, curvature products and looks evaluate it again,
and each evaluation would change the weights once more.
"""

from __future__ import annotations

from operator import ne, or_
from typing import TYPE_CHECKING

from torch import nn

from mlo.errors import GraphError
from mlo.levels.problem import Problem
from mlo.levels.state import State
from mlo.ops.writes import VERSION, Values

if TYPE_CHECKING:
    from mlo.steps.level import Level


class Unwritten:
    """A context for the evaluation of a loss, which may not write into parameters.

    Each evaluation compares torch's counts of writes. The first one of a level also has copies of the values, by which
    it finds what is written through ``.data``, and puts back what was written.

    Args:
        level: whose loss it is; what it reads runs in substituted states.
        state: of the level itself.

    Raises:
        GraphError: at the end.
    """

    def __init__(self, level: Level, state: State) -> None:
        self._level, self._state = level, state
        tensors = [*state.variables, *state.constants]
        for read in level.reads.values():
            if read.problem.substitute is not None:
                tensors += read.problem.substitute.parameters
        self._tensors = tensors

    def __enter__(self) -> None:
        self._versions = [*map(VERSION, self._tensors)]
        self._values = None if self._level.writes_nothing else Values(self._tensors)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        written = [*map(ne, map(VERSION, self._tensors), self._versions)]
        if self._values is not None:
            written = [*map(or_, written, self._values.put_back())]
        if any(written):
            raise self._error(written.index(True), restored=self._values is not None)
        if kind is None:
            self._level.writes_nothing = True

    def _error(self, index: int, restored: bool) -> GraphError:
        problems = [self._level.problem, *[read.problem for read in self._level.reads.values()]]
        for problem in problems:
            if index < problem.places.parameters:
                break
            index -= problem.places.parameters
        return refusal(self._level.name, problem, problem.places.names[index], restored)


def refusal(level: str, problem: Problem, name: str, restored: bool) -> GraphError:
    """The error for a loss that writes into a parameter."""
    whose = "its module" if level == problem.name else f"the module of {problem.name!r}"
    left = "It has its values of before" if restored else "Engine.step keeps what was written, other calls do not"
    return GraphError(
        f"problem {level!r}: evaluating its loss writes into the parameter {name!r} of {whose}, and each virtual step "
        f"and curvature product would do so again. {left}. {_REMEDY}"
    )


_REMEDY = (
    "Compute what is used without writing into the parameter (normalize or clamp in forward, or by "
    "torch.nn.utils.parametrize); keep averages in buffers; if a first batch sets initial values, run the module on it "
    "once before the engine is made"
)


def refuse_max_norm(problem: Problem) -> None:
    """Raise a GraphError for an embedding that normalizes its weight in place."""
    for path, part in problem.module.named_modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.max_norm is not None:
            raise GraphError(
                f"problem {problem.name!r}: the {type(part).__name__} {path!r} of its module has max_norm: it writes "
                "into its weight each time it runs, and each virtual step and curvature product would do so again. "
                "Make it without max_norm, and scale down its output in forward: "
                "e * (max_norm / e.norm(dim=-1, keepdim=True).clamp(min=1e-7)).clamp(max=1)"
            )
