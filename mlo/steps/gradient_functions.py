"""Gradient passes as functions of tensors that can be compiled, micro-batches, and segments of several steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mlo.levels.problem import Problem, State
from mlo.levels.substitution import OwnSubstitute, ReadSubstitute, loss_with, loss_within
from mlo.ops.rng import Randomness
from mlo.ops.vectors import Vector, filled
from mlo.steps import sgd

Reads = Sequence[tuple[str, bool]]  # the problems that a loss reads, and whether it is differentiated for each


@dataclass(frozen=True)
class Pass:
    """What one evaluation of a problem's loss and its derivative gave.

    Attributes:
        loss: the scalar, detached.
        gradients: {tensor: the loss's gradient for it}, for the requested tensors that the loss depends on.
        buffers: the module's after it.
    """

    loss: Tensor
    gradients: dict[Tensor, Tensor]
    buffers: Mapping[str, Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """What one of the evaluations of a step was taken on; a step has several where gradients are accumulated.

    Attributes:
        batch: as the problem's data gave it.
        randomness: the random state that it drew from.
        buffers: the module's before it, as the previous micro-batch left them; None for the first of a step.
        scale: what the loss was multiplied by while its gradient was taken.
        step: how many steps the problem had taken before.
    """

    batch: Any
    randomness: Randomness
    buffers: Mapping[str, Tensor] | None = None
    scale: float = 1.0
    step: int | None = None

    def state(self, of: State) -> State:
        """The state in which it is evaluated, in a step from the state ``of``."""
        return of if self.buffers is None else replace(of, buffers=self.buffers)


def unscaled(gradients: dict[Tensor, Tensor], scale: float) -> dict[Tensor, Tensor]:
    """The gradients of a loss that was multiplied by ``scale``, divided by it."""
    return gradients if scale == 1.0 else {key: gradient / scale for key, gradient in gradients.items()}


def mean(passes: Iterable[Pass], count: int) -> Pass:
    """The mean of ``count`` passes that follow each other, one at a time; the buffers are those that the last left."""
    if count == 1:
        return next(iter(passes))
    losses: list[Tensor] = []
    total: dict[Tensor, Tensor] = {}
    buffers: Mapping[str, Tensor] = {}
    for each in passes:
        for key, gradient in each.gradients.items():
            total[key] = total[key].add_(gradient, alpha=1 / count) if key in total else gradient / count
        losses.append(each.loss)
        buffers = each.buffers
    return Pass(torch.stack(losses).mean(), total, buffers)


def pass_function(
    problems: Mapping[str, Problem],
    name: str,
    reads: Reads,
    first: Sequence[tuple[str, str]],
    second: Sequence[tuple[str, str]],
    keep_graph: bool,
    device: torch.device,
    lowered: torch.dtype | None,
) -> Callable[..., Any]:
    """One pass of a problem, or one curvature product, as a function of tensors alone, to be compiled.

    Args:
        reads: the problems that it reads, and whether each is differentiated for.
        first: (problem, variable) pairs for which the loss is differentiated.
        second: those for which the product of that gradient with a vector is differentiated; empty: no product.
    """

    def run(
        parameters: Mapping[str, Mapping[str, Tensor]],
        buffers: Mapping[str, Mapping[str, Tensor]],
        batch: Any,
        vector: Sequence[Tensor] | None,
        scale: Tensor | None,
    ) -> tuple[Tensor, Sequence[Tensor | None], Mapping[str, Tensor], dict[str, int]]:
        calls = {name: 0, **{read: 0 for read, _ in reads}}
        own = OwnSubstitute(State(parameters[name], buffers[name]), calls, name)
        substitutes: dict[str, OwnSubstitute | ReadSubstitute] = {name: own}
        for read, differentiate in reads:
            substitutes[read] = ReadSubstitute(
                State(parameters[read], buffers[read]), calls, read, differentiate, None, device
            )
        with torch.autocast(device.type, lowered, enabled=lowered is not None):
            loss = loss_with(problems, name, substitutes, batch)
        wanted = [parameters[n][v] for n, v in first]
        graph = keep_graph or vector is not None
        scaled = loss if scale is None else loss * scale
        found = torch.autograd.grad(scaled, wanted, create_graph=graph, allow_unused=True) if wanted else ()
        if vector is not None:
            pairs = [(g, u) for g, u in zip(found, vector, strict=True) if g is not None and g.requires_grad]
            wanted = [parameters[n][v] for n, v in second]
            found = torch.autograd.grad([g for g, _ in pairs], wanted, [u for _, u in pairs], allow_unused=True)
        return loss.detach(), found, own.buffers, calls

    return run


def segment_function(
    problems: Mapping[str, Problem],
    name: str,
    reads: Reads,
    groups: Mapping[str, int],
    device: torch.device,
) -> Callable[..., Any]:
    """Steps of a problem by torch's SGD, one after another, as a function of tensors alone that leaves their graph.

    Args:
        groups: {variable: the number of its optimizer's parameter group}.
    """

    def run(
        parameters: Mapping[str, Mapping[str, Tensor]],
        buffers: Mapping[str, Mapping[str, Tensor]],
        batches: Sequence[Any],
        slots: sgd.Slots,
        rates: sgd.Groups,
    ) -> tuple[bool, list[Tensor], sgd.Slots, Mapping[str, Tensor], dict[str, int], list[Tensor]]:
        calls = {name: 0, **{read: 0 for read, _ in reads}}
        state = State(parameters[name], buffers[name])
        of = {variable: rates[group] for variable, group in groups.items()}
        reached, losses = True, []
        try:
            for read, differentiate in reads:
                there = State(parameters[read], buffers[read])
                problems[read].substitute(ReadSubstitute(there, calls, read, differentiate, None, device))
            for batch in batches:
                own = OwnSubstitute(state, calls, name)
                problems[name].substitute(own)
                loss = loss_within(problems, name, batch)
                variables = [state.parameters[variable] for variable in of]
                found: Sequence[Tensor | None] = [None] * len(variables)
                if loss.requires_grad:
                    found = torch.autograd.grad(loss, variables, create_graph=True, allow_unused=True)
                reached = reached and any(gradient is not None for gradient in found)
                moved, slots = sgd.step(of, state.parameters, dict(zip(of, found, strict=True)), slots)
                state = State({**state.parameters, **moved}, own.buffers)
                losses.append(loss.detach())
                if not torch.compiler.is_compiling():  # compiled steps are of losses that do not ask
                    problems[name].steps_taken += 1
        finally:
            for used in (name, *(read for read, _ in reads)):
                problems[used].substitute(None)
        return reached, [state.parameters[variable] for variable in of], slots, state.buffers, calls, losses

    return run


@dataclass(frozen=True)
class Segment:
    """Steps by torch's SGD that were taken in one graph, whose backward is their pullback.

    Attributes:
        start, end: the variables before the first step, which the graph ends at, and after the last one.
        begun, left: the optimizer's slots there.
        buffers: the module's after the last step.
        losses: of each step, detached.
    """

    start: Vector
    begun: sgd.Slots
    end: Vector
    left: sgd.Slots
    buffers: Mapping[str, Tensor]
    losses: Sequence[Tensor]

    def pull(
        self, cotangent: Vector, slots: sgd.Slots, onto: Sequence[Tensor], oldest: bool
    ) -> tuple[Vector, dict[str, dict[str, Tensor]], Sequence[Tensor | None]]:
        """From the cotangents of what the steps led to, to those of what they began with and of the tensors ``onto``.

        Args:
            oldest: whether nothing before the first step is needed.
        """
        pairs = [*zip(self.end, cotangent, strict=True)]
        pairs += [(self.left[n][key], c) for n, slot in slots.items() for key, c in slot.items()]
        ends, given = zip(*((end, c) for end, c in pairs if end.requires_grad), strict=True)
        start = () if oldest else self.start
        keys = [] if oldest else [(n, k) for n, s in self.begun.items() for k, v in s.items() if v is not None]
        inputs = [*start, *(self.begun[n][k] for n, k in keys), *onto]
        # the same steps may be pulled back for several upper problems
        found = torch.autograd.grad(ends, inputs, given, retain_graph=True, allow_unused=True)
        before: dict[str, dict[str, Tensor]] = {}
        for (n, k), of_slot in zip(keys, found[len(start) :], strict=False):
            if of_slot is not None:
                before.setdefault(n, {})[k] = of_slot
        return filled(found[: len(start)], start), before, found[len(start) + len(keys) :]
