"""One pure evaluation of a loss: parameters and buffers substituted, random state replayed, passes counted."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlo.errors import GraphError
from mlo.memo import Memo
from mlo.problem import Problem, State
from mlo.randomness import Randomness, outside_state, replay, same_outside


def twice_differentiable() -> AbstractContextManager[None]:
    """Inside, scaled-dot-product attention takes its mathematical kernel; the fused ones have no second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation of a problem's loss gave.

    Attributes:
        loss: the scalar, with its graph.
        buffers: the module's buffers after it (running statistics, say); the module's own are untouched.
    """

    loss: Tensor
    buffers: Mapping[str, Tensor]


class Evaluator:
    """Evaluates losses of a set of problems, and counts the passes.

    Attributes:
        passes: {problem: {kind: forward passes of its module}}; kinds are "step" (a real step), "virtual" (a step of
            lookahead), "product" (a curvature product) and "read" (another problem's loss read it).
    """

    def __init__(self, problems: Mapping[str, Problem], device: torch.device) -> None:
        self.problems = problems
        self.device = device
        self.passes: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._torch_only: set[str] = set()

    def draws_outside(self, names: Collection[str]) -> bool:
        """Whether the loss of one of these may draw from NumPy's or Python's generators: until it has not, once."""
        return not self._torch_only.issuperset(names)

    def capture(self, name: str) -> Randomness:
        """The random state that the loss of ``name`` would draw from now."""
        return Randomness.capture(self.device, self.draws_outside((name,)))

    def evaluate(
        self,
        name: str,
        states: Mapping[str, State],
        batch: Any,
        *,
        kind: str,
        through: Collection[str] = (),
        memo: Memo | None = None,
        moving: Collection[str] = (),
        autocast: bool = True,
        randomness: Randomness | None = None,
    ) -> Evaluation:
        """The loss of problem ``name`` where it and all that it reads are in ``states``.

        Args:
            kind: what the pass is for, as it is counted.
            through: problems whose parameters the loss is to be differentiated for; the other reads are constants.
            memo: keeps the outputs of the problems read, for further evaluations of the same loss.
            moving: problems read whose states differ between those evaluations, so that nothing of them is kept.
            autocast: under the problem's own autocast, if it has one.
            randomness: drawn from instead of the present random state, which is then left alone.

        Raises:
            GraphError: if the loss is not a scalar tensor.
        """
        problem = self.problems[name]
        own = _Own(states[name], self.passes[name], kind)
        reads = {
            read: _Read(
                states[read],
                self.passes[read],
                differentiate=read in through,
                memo=None if read in moving else memo,
                device=self.device,
            )
            for read in problem.node.reads
        }
        replayed = nullcontext() if randomness is None else replay(randomness, self.device)
        if memo is not None:
            memo.begin()
        outside = outside_state() if self.draws_outside((name,)) else None
        lowered = torch.autocast(self.device.type, problem.autocast, enabled=autocast and problem.autocast is not None)
        with _standing(problem, own), replayed, lowered, _all_standing(self.problems, reads):
            arguments = {argument: self.problems[read] for argument, read in problem.arguments.items()}
            loss = problem.loss(batch, **arguments)
            if outside is not None and randomness is None and same_outside(outside, outside_state()):
                self._torch_only.add(name)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise GraphError(f"problem {name!r}: its loss returned {found}; return a scalar tensor (.mean() or .sum())")
        return Evaluation(loss, own.buffers)


class _Own:
    """Stands in for the module of the problem whose loss is evaluated."""

    def __init__(self, state: State, passes: Counter[str], kind: str) -> None:
        self.parameters = state.parameters
        self.buffers = {name: buffer.clone() for name, buffer in state.buffers.items()}
        self._substitutes = dict(self.buffers) if state.live else {**state.parameters, **self.buffers}
        self._passes = passes
        self._kind = kind

    def run(self, problem: Problem, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._passes[self._kind] += 1
        output = problem.run_with(self._substitutes, args, kwargs)
        self.buffers = {name: self._substitutes[name].detach() for name in self.buffers}
        return output


class _Read:
    """Stands in for the module of a problem that the loss reads; its buffers are thrown away afterwards."""

    def __init__(
        self, state: State, passes: Counter[str], *, differentiate: bool, memo: Memo | None, device: torch.device
    ) -> None:
        self._state = state
        self._differentiate = differentiate
        if differentiate:
            self.parameters: Mapping[str, Tensor] = state.parameters
        else:
            self.parameters = {name: parameter.detach() for name, parameter in state.parameters.items()}
        self._passes = passes
        self._memo = memo
        self._device = device

    def run(self, problem: Problem, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def forward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._passes["read"] += 1
            buffers = {name: buffer.clone() for name, buffer in self._state.buffers.items()}
            parameters = self.parameters
            if not torch.is_grad_enabled():  # also where the module gives a parameter itself
                parameters = {name: parameter.detach() for name, parameter in parameters.items()}
            return problem.run_with({**parameters, **buffers}, args, kwargs)

        if self._memo is None:
            return forward(args, kwargs)
        parameters = tuple(self.parameters.values()) if self._differentiate else ()
        return self._memo.run(problem.name, forward, args, kwargs, parameters, self._device)


@contextmanager
def _standing(problem: Problem, stand: _Own | _Read) -> Iterator[None]:
    problem.stand_in(stand)
    try:
        yield
    finally:
        problem.stand_in(None)


@contextmanager
def _all_standing(problems: Mapping[str, Problem], stands: Mapping[str, _Read]) -> Iterator[None]:
    for name, stand in stands.items():
        problems[name].stand_in(stand)
    try:
        yield
    finally:
        for name in stands:
            problems[name].stand_in(None)
