"""What an engine decides before the first step: estimators, paths, device. Invalid combinations raise here."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Sequence

import torch

from mlo.errors import ConfigError, GraphError
from mlo.hypergradient import Estimator, Product, build_estimator
from mlo.levels.graph import Graph
from mlo.levels.problem import Problem
from mlo.ops import distributed


class Plan:
    """The graph of the problems, with an estimator for each.

    Attributes:
        graph: which problem reads which.
        estimators: {problem: the estimator with which it is differentiated through}.
        paths: {problem: the backward pass of its hypergradient, see :meth:`mlo.levels.graph.Graph.paths`}; empty for a
            problem that is not differentiated through others.
        lower: {problem: the lower problems that its loss reads, with which its backward pass starts}.
        inner: {problem: lower problems whose steps are part of its curvature}, lowest first.
        tops: the top problems that have a hypergradient.
        lookahead: whether top problems step after virtual steps of the others.
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
        blocked = {name for name, estimator in self.estimators.items() if not estimator.differentiates}
        self.paths = {name: self.graph.paths(name, blocked) for name in self.graph.names}
        nested = self._nested()
        self.inner = {m: tuple(reversed(self.paths[m])) for m in nested} if inner_path else {}
        if inner_path:
            self._check_inner()
            self.paths = {name: self.graph.paths(name, blocked, self.inner) for name in self.graph.names}
        self.lower = {n: [read for read in self.graph.lower_reads(n) if read in at] for n, at in self.paths.items()}
        self.tops = [name for name in self.graph.tops() if self.graph.is_upper(name)]
        through = {name for paths in self.paths.values() for name in paths}
        for name in (name for name in self.graph.names if name in through):
            self.estimators[name].check(self._problems[name])
            self._refuse_half_products(name)
        self.lookahead = any(self.estimators[n].lookahead for n in through) if lookahead is None else lookahead
        self._refuse_late_levels()
        for middle in nested if not inner_path else ():
            warnings.warn(
                f"the gradient of {middle!r} itself runs through {', '.join(map(repr, self.paths[middle]))}: its "
                "estimator leaves this inner path out of the curvature, so hypergradients above it may be inaccurate; "
                "pass Engine(..., inner_path=True) to include it",
                stacklevel=4,
            )

    def _nested(self) -> list[str]:
        """Middle problems: their gradient goes through lower ones, and that of an upper one through them."""
        return [m for m, paths in self.paths.items() if paths and any(m in above for above in self.paths.values())]

    def _check_inner(self) -> None:
        for middle, lows in self.inner.items():
            steps = max(self._problems[middle].steps, self._problems[middle].steps_ahead or 1)
            if steps > 1:
                raise ConfigError(
                    f"inner_path: problem {middle!r} takes {steps} steps per round, but only one step can be "
                    f"differentiated through the same lower steps; give {middle!r} steps=1"
                )
            for low in lows:
                if not self.estimators[low].needs_before:
                    raise ConfigError(
                        f"inner_path: {low!r}, below {middle!r}, has an estimator that does not differentiate steps; "
                        "give it hypergradient='one_step' or 'unrolled', or pass inner_path=False"
                    )

    def targets(self, lower: str, uppers: Collection[str]) -> tuple[str, ...]:
        """The problems that ``lower`` is pulled back onto in the backward passes of ``uppers``."""
        return tuple(dict.fromkeys(t for upper in uppers for t in self.paths[upper].get(lower, ())))

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


def known_device(device: str | torch.device) -> torch.device:
    """The device of this name; nothing is moved to it.

    Raises:
        ConfigError: if there is no device of this name, or it is not available.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:  # whose message lists all that torch was ever built for
        raise ConfigError(f"device={device!r} cannot be used: there is no device of this name; {DEVICES}") from error
    gpus = torch.cuda.device_count() if found.type == "cuda" else 0
    if found.type == "cuda" and (found.index or 0) >= gpus:
        built = "torch finds" if torch.backends.cuda.is_built() else "this build of torch cannot use them, so there are"
        count = f"{gpus or 'no'} CUDA GPU{'s' * (gpus != 1)}"
        raise ConfigError(f"device={str(device)!r} cannot be used: {built} {count} here; {DEVICES}")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if found.type not in ("cpu", "cuda") and (
        accelerator is None or found.type != accelerator.type or (found.index or 0) >= torch.accelerator.device_count()
    ):
        raise ConfigError(f"device={str(device)!r} cannot be used: there is no such device here; {DEVICES}")
    return found


DEVICES = "pass 'cpu', 'cuda' or 'cuda:1' for a GPU, or 'auto' for a GPU if there is one"


def move_to(problems: Sequence[Problem], device: str | torch.device) -> torch.device:
    """Move modules, optimizer states and data streams to ``device``; "auto" is a CUDA GPU if there is one.

    In a distributed run each process has its own GPU, and all start with the parameters and buffers of the first one.

    Returns:
        The device, with an index.

    Raises:
        ConfigError: if the device is not available.
    """
    try:
        target = torch.empty(0, device=distributed.own_device(known_device(device))).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={device!r} cannot be used ({error}); {DEVICES}") from error
    for problem in problems:
        problem.module.to(target)
        for slots in problem.optimizer.state.values():
            for key, value in slots.items():
                if isinstance(value, torch.Tensor) and not (key == "step" and value.device.type == "cpu"):
                    slots[key] = value.to(target)
        problem.stream.device = target
        distributed.follow_main([*problem.module.parameters(), *problem.module.buffers()])
    return target


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
    owners: dict[int, tuple[Problem, str]] = {}
    for problem in problems:
        for name, parameter in problem.module.named_parameters():
            owner, own_name = owners.setdefault(id(parameter), (problem, name))
            if owner is not problem and (name in problem.variables or own_name in owner.variables):
                raise GraphError(
                    f"problems {owner.name!r} and {problem.name!r} share a parameter ({own_name!r} and {name!r}); a "
                    "parameter can belong to one level only: copy the module (copy.deepcopy), or let one problem read "
                    "the other"
                )
