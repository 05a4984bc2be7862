"""Outputs of the problems that a loss reads, computed once and shared by several evaluations of that loss.

The outputs are cut out of the graph: an evaluation differentiates its loss down to them, and only the combination of
several evaluations' cotangents (a difference, say) goes on through the module that was read. So two student losses
over the same pseudo-labels cost the teacher one forward and one backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from mlo.ops.rng import Randomness


@dataclass(frozen=True)
class _Call:
    """One call of a read problem."""

    problem: str
    arguments: list[Any]
    structure: TreeSpec
    parameters: Sequence[Tensor]
    outputs: list[Any]
    leaves: list[Any]
    output_structure: TreeSpec
    randomness_after: Randomness

    def is_for(self, problem: str, arguments: list[Any], structure: TreeSpec) -> bool:
        """Whether the call had these very arguments (tensors by identity)."""
        return (
            self.problem == problem
            and self.structure == structure
            and all(_same(mine, other) for mine, other in zip(self.arguments, arguments, strict=True))
        )


class ReadCache:
    """The calls of read problems made so far by the evaluations of one loss at one state of what it reads."""

    def __init__(self) -> None:
        self._calls: list[_Call | None] = []
        self._next = 0

    def begin(self) -> None:
        """Another evaluation begins: its first call is matched with the first one remembered, and so on."""
        self._next = 0

    def run(
        self,
        problem: str,
        forward: Callable[[tuple[Any, ...], dict[str, Any]], Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        parameters: Sequence[Tensor],
        device: torch.device,
    ) -> Any:
        """The output of ``forward(args, kwargs)``, remembered where this call had the same arguments before.

        A call under ``no_grad``, and one whose arguments depend on the parameters under evaluation, is not remembered:
        it runs, and stays in the graph. ``parameters`` are those that the call can be differentiated for.
        """
        arguments, structure = tree_flatten((args, kwargs))
        leaves = self.leaves
        bound = any(isinstance(a, Tensor) and a.requires_grad and not _among(a, leaves) for a in arguments)
        if bound or not torch.is_grad_enabled():
            return forward(args, kwargs)
        index, self._next = self._next, self._next + 1
        if index < len(self._calls):
            call = self._calls[index]
            if call is None or not call.is_for(problem, arguments, structure):
                return forward(args, kwargs)
            call.randomness_after.restore(device)
            return tree_unflatten(call.leaves, call.output_structure)
        output = forward(args, kwargs)
        outputs, output_structure = tree_flatten(output)
        if any(not isinstance(part, Tensor) and not _plain(part) for part in outputs):
            self._calls.append(None)  # tensors in there could not be cut out
            return output
        cut = [o.detach().requires_grad_(o.requires_grad) if isinstance(o, Tensor) else o for o in outputs]
        after = Randomness.capture(device)
        self._calls.append(_Call(problem, arguments, structure, parameters, outputs, cut, output_structure, after))
        return tree_unflatten(cut, output_structure)

    @property
    def leaves(self) -> list[Tensor]:
        """The remembered outputs, cut out of the graph, that evaluations differentiate down to."""
        remembered = [leaf for call in self._calls if call is not None for leaf in call.leaves]
        return [leaf for leaf in remembered if isinstance(leaf, Tensor) and leaf.requires_grad]

    def pull(self, cotangents: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Take cotangents of leaves on to the parameters of the problems read; other tensors' stay as they are."""
        pulled = dict(cotangents)
        for call in reversed(self._calls):
            if call is None:
                continue
            pairs = [
                (output, pulled.pop(leaf))
                for output, leaf in zip(call.outputs, call.leaves, strict=True)
                if isinstance(leaf, Tensor) and leaf in pulled
            ]
            earlier = [a for a in call.arguments if isinstance(a, Tensor) and a.requires_grad]
            inputs = [*(p for p in call.parameters if p.requires_grad), *earlier]
            if pairs and inputs:
                outputs, given = zip(*pairs, strict=True)
                gradients = torch.autograd.grad(outputs, inputs, given, retain_graph=True, allow_unused=True)
                add_to(pulled, inputs, gradients)
        return pulled


def add_to(total: dict[Tensor, Tensor], keys: Sequence[Tensor], terms: Sequence[Tensor | None]) -> None:
    """Add each term to ``total`` under its key; None adds nothing."""
    for key, term in zip(keys, terms, strict=True):
        if term is not None:
            total[key] = total[key] + term if key in total else term


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and _plain(one) and bool(one == other))


def _plain(value: Any) -> bool:
    """Whether a value holds no tensor, and can be compared."""
    return value is None or isinstance(value, bool | int | float | complex | str | bytes)


def _among(tensor: Tensor, others: Sequence[Tensor]) -> bool:
    return any(tensor is other for other in others)
