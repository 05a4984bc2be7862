"""What an engine decides before the first step: estimators, paths, device. Invalid combinations raise here."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import torch

from mlo.errors import ConfigError, GraphError
from mlo.hypergradient import Estimator, Product, Recording, build_estimator
from mlo.levels.graph import Graph
from mlo.levels.problem import Problem
from mlo.ops import distributed
from mlo.ops.derivatives import Mode
from mlo.training.problem_checks import Checks


class Role(NamedTuple):
    """What an engine's estimators make of one problem's steps.

    Attributes:
        recording: what is kept of them.
        paths: see :class:`Plan`.
        lower: the lower problems that its loss reads, with which its backward pass starts.
        inner: the lower problems whose steps are part of its curvature, lowest first.
        keeps_graph: whether the graphs of its gradients are kept for exact products.
        again: whether recorded steps are taken again, which needs the optimizer's state before them.
        joins: whether several steps may be recorded in one graph.
    """

    recording: Recording
    paths: Mapping[str, tuple[str, ...]]
    lower: tuple[str, ...]
    inner: Sequence[str]
    keeps_graph: bool
    again: bool
    joins: bool


class Plan:
    """The graph of the problems, with an estimator for each.

    Attributes:
        graph: which problem reads which.
        estimators: {problem: the estimator with which it is differentiated through}.
        recordings: {problem: what is kept of its steps for that}.
        paths: {problem: the backward pass of its hypergradient, see :meth:`mlo.levels.graph.Graph.paths`}; empty for a
            problem that is not differentiated through others.
        roles: {problem: what follows for its steps}.
        modes: {problem: how products differentiate its gradient}.
        inner: {problem: lower problems whose steps are part of its curvature}, lowest first.
        nested: the middle problems whose gradient runs through lower ones.
        tops: the top problems that have a hypergradient.
        lookahead: whether top problems step after virtual steps of the others.
        checks: of what may have changed at a later call.
    """

    def __init__(
        self, problems: Sequence[Problem], hypergradient: object, lookahead: bool | None, inner_path: bool
    ) -> None:
        others = [p for p in problems if not isinstance(p, Problem)]
        if others:
            raise ConfigError(
                f"problems: {others[0]!r} is not an mlo.Problem; pass a list of problems, lowest level first"
            )
        _refuse_missing_batches(problems)
        self.graph = Graph([problem.node for problem in problems])
        self._problems = {problem.name: problem for problem in problems}
        _refuse_levels_in_processes(problems)
        _refuse_shared(problems)
        _refuse_shared_generators(problems)
        default = build_estimator(hypergradient)
        self.estimators: dict[str, Estimator] = {
            p.name: default if p.hypergradient is None else build_estimator(p.hypergradient) for p in problems
        }
        self.recordings = {name: estimator.recording for name, estimator in self.estimators.items()}
        blocked = {name for name, estimator in self.estimators.items() if not estimator.differentiates}
        self.paths = {name: self.graph.paths(name, blocked) for name in self.graph.names}
        self.nested = nested = self._nested()
        self.inner = {m: tuple(reversed(self.paths[m])) for m in nested} if inner_path else {}
        if inner_path:
            self._check_inner()
            self.paths = {name: self.graph.paths(name, blocked, self.inner) for name in self.graph.names}
        self.roles = {name: self._role(name) for name in self.graph.names}
        self._targets: dict[tuple[str, tuple[str, ...]], tuple[list[str], tuple[str, ...]]] = {}
        self.tops = [name for name in self.graph.tops() if self.graph.is_upper(name)]
        through = {name for paths in self.paths.values() for name in paths}
        self.modes = {name: self._modes(name) if name in through else frozenset[Mode]() for name in self.graph.names}
        through_in_order = [name for name in self.graph.names if name in through]
        for name in through_in_order:
            self._refuse_half_products(name)
        self.lookahead = any(self.estimators[n].lookahead for n in through) if lookahead is None else lookahead
        alone = {self.graph.names[-1], *(self.tops if self.lookahead else ())}
        virtual = set(self.graph.names) - alone
        self.checks = Checks(self._problems, {name: self.estimators[name] for name in through_in_order}, virtual)
        self._refuse_late_levels()
        for middle in nested if not inner_path else ():
            warnings.warn(
                f"the gradient of {middle!r} itself runs through {', '.join(map(repr, self.paths[middle]))}: its "
                "estimator leaves this inner path out of the curvature, so hypergradients above it may be inaccurate; "
                "pass Engine(..., inner_path=True) to include it",
                stacklevel=4,
            )

    def _role(self, name: str) -> Role:
        problem, recording, paths = self._problems[name], self.recordings[name], self.paths[name]
        keeps_graph = recording.graph and not paths and problem.autocast is None
        again = recording.every > 1 or any(name in lows for lows in self.inner.values())
        return Role(
            recording,
            paths,
            lower=tuple([read for read in self.graph.lower_reads(name) if read in paths]),
            inner=self.inner.get(name, ()),
            keeps_graph=keeps_graph,
            again=again,
            joins=recording.joins and keeps_graph and not again,
        )

    def _modes(self, name: str) -> frozenset[Mode]:
        """How products differentiate a problem's gradient: its own, and those of levels whose inner path it is on."""
        above = [middle for middle, lows in self.inner.items() if name in lows]
        modes: set[Mode] = {"reverse"} if above else set()  # inner steps are taken again with their graphs
        for each in (name, *above):
            product = getattr(self.estimators[each], "product", None)
            if isinstance(product, Product) and product.mode is not None:
                modes.add(product.mode)
        return frozenset(modes)

    def _nested(self) -> list[str]:
        """Middle problems: their gradient goes through lower ones, and that of an upper one through them."""
        return [m for m, paths in self.paths.items() if paths and any(m in above for above in self.paths.values())]

    def _check_inner(self) -> None:
        for middle, lows in self.inner.items():
            for low in lows:
                if not self.recordings[low].before:
                    raise ConfigError(
                        f"inner_path: {low!r}, below {middle!r}, has an estimator that does not differentiate steps; "
                        "give it hypergradient='one_step' or 'unrolled', or pass inner_path=False"
                    )

    def targets(self, lower: str, following: tuple[str, ...]) -> tuple[list[str], tuple[str, ...]]:
        """Those of ``following``, above a lower problem, that have a hypergradient, and what it is pulled back onto."""
        found = self._targets.get((lower, following))
        if found is None:
            later = [other for other in following if self.paths[other]]
            targets = [target for upper in later for target in self.paths[upper].get(lower, ())]
            found = self._targets[lower, following] = later, tuple(dict.fromkeys(targets))
        return found

    def _refuse_half_products(self, name: str) -> None:
        product = getattr(self.estimators[name], "product", None)
        if isinstance(product, Product) and product.autocast and self._problems[name].autocast is torch.float16:
            raise ConfigError(
                f"problem {name!r}: curvature products under float16 would underflow; turn off the product's option "
                "autocast, or give the problem autocast=torch.bfloat16"
            )

    def _refuse_late_levels(self) -> None:
        for upper, paths in self.paths.items():
            start = self._problems[upper].warmup
            for lower in paths:
                if self._problems[lower].warmup > start:
                    raise ConfigError(
                        f"problem {upper!r} starts after {start} rounds, but is differentiated through {lower!r}, "
                        f"which starts after {self._problems[lower].warmup}; raise the warmup of {upper!r}"
                    )


def _refuse_missing_batches(problems: Sequence[Problem]) -> None:
    names = [problem.name for problem in problems]
    for problem in problems:
        first = next(iter(inspect.signature(problem.loss).parameters))
        if first in names and first not in problem.arguments:
            raise GraphError(
                f"problem {problem.name!r}: the first parameter of its loss receives the batch, but is named "
                f"{first!r} like a problem; write loss(self, batch, {first}), even if the problem has no data"
            )


def _refuse_levels_in_processes(problems: Sequence[Problem]) -> None:
    for problem in problems if distributed.world() > 1 else ():
        for read in problem.node.reads:
            raise ConfigError(
                f"problem {problem.name!r} reads {read!r}, but several processes can train only problems that read no "
                "others: gradients are averaged over processes, cotangents of hypergradients are not. Run "
                "it in one process, without torchrun"
            )


def _refuse_shared_generators(problems: Sequence[Problem]) -> None:
    owners: dict[int, str] = {}
    for problem in problems:
        for generator in problem.stream.generators():
            if id(generator) in owners:
                raise ConfigError(
                    f"the data of {owners[id(generator)]!r} and of {problem.name!r} draw from one torch.Generator, so "
                    "they cannot be resumed independently; give each DataLoader its own generator"
                )
            owners[id(generator)] = problem.name


def _refuse_shared(problems: Sequence[Problem]) -> None:
    for lower, upper in combinations(problems, 2):
        names = {id(parameter): name for name, parameter in lower.module.named_parameters()}
        shared = [(names[id(p)], name) for name, p in upper.module.named_parameters() if id(p) in names]
        trained = [(mine in lower.variables, name in upper.variables) for mine, name in shared]
        for kind in ((True, True), (False, True), (True, False)):
            if kind in trained:
                raise GraphError(_shared(lower, upper, *shared[trained.index(kind)], *kind))


def _shared(lower: Problem, upper: Problem, mine: str, name: str, by_lower: bool, by_upper: bool) -> str:
    """The message about a parameter of two problems."""
    begin = f"problems {lower.name!r} and {upper.name!r} share a parameter ({mine!r} and {name!r})"
    if by_lower and by_upper:
        return (
            f"{begin}, and the optimizers of both train it; a parameter can belong to one level only: train it in one "
            "of them, and let the other read that problem, or copy the module (copy.deepcopy)"
        )
    one, other = (upper.name, lower.name) if by_upper else (lower.name, upper.name)
    return (
        f"{begin}, which only {one!r} trains; in the module of {other!r} it would be a constant, and carry no "
        f"gradient. Give it a module of its own, whose forward returns it, and pass that to {one!r}; let the loss of "
        f"{other!r} read it, as in self(x, {one}())"
    )
