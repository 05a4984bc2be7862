"""A cache for the outputs of the problems that a loss reads, shared by several evaluations of that loss.

The outputs are detached from the graph. Each evaluation differentiates its loss with respect to these outputs. Only a
combination of the resulting cotangents (their difference, for example) is then backpropagated through the module that
was read. So two student losses on the same pseudo-labels cost the teacher one forward and one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from mlo.ops.rng import Randomness
from mlo.ops.vectors import aligned, dense


@dataclass(frozen=True)
class _Call:
    """One cached call of a problem that the loss reads."""

    problem: str
    arguments: list[Any]
    structure: TreeSpec
    parameters: Sequence[Tensor]
    outputs: list[Any]
    leaves: list[Any]
    output_structure: TreeSpec
    randomness_after: Randomness

    def is_for(self, problem: str, arguments: list[Any], structure: TreeSpec) -> bool:
        """Whether the call had the same arguments (tensors are compared by identity)."""
        return (
            self.problem == problem
            and self.structure == structure
            and all(_same(mine, other) for mine, other in zip(self.arguments, arguments, strict=True))
        )


class ReadCache:
    """The calls of read problems in the evaluations of one loss, while the states that it reads stay the same."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._calls: list[_Call | None] = []
        self._next = 0

    def begin(self) -> None:
        """Start another evaluation: its first call is compared with the first cached one, and so on."""
        self._next = 0

    def run(
        self,
        problem: str,
        forward: Callable[[tuple[Any, ...], dict[str, Any]], Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        parameters: Sequence[Tensor],
    ) -> Any:
        """The output of ``forward(args, kwargs)``, from the cache if the same call was made with the same arguments.

        Calls under ``no_grad`` are not cached, nor those whose arguments depend on the parameters that the loss is
        differentiated for, nor those inside a transform of torch.func: they run, and stay in the graph.

        Args:
            parameters: the parameters that the call can be differentiated for.
        """
        arguments, structure = tree_flatten((args, kwargs))
        leaves = self.leaves
        bound = any(isinstance(a, Tensor) and a.requires_grad and not _among(a, leaves) for a in arguments)
        if bound or not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            return forward(args, kwargs)
        index, self._next = self._next, self._next + 1
        if index < len(self._calls):
            call = self._calls[index]
            if call is None or not call.is_for(problem, arguments, structure):
                return forward(args, kwargs)
            call.randomness_after.restore(self._device)
            return tree_unflatten(call.leaves, call.output_structure)
        output = forward(args, kwargs)
        outputs, output_structure = tree_flatten(output)
        if any(not isinstance(part, Tensor) and not _plain(part) for part in outputs):
            self._calls.append(None)  # an unknown type may contain tensors that could not be detached
            return output
        cut = [o.detach().requires_grad_(o.requires_grad) if isinstance(o, Tensor) else o for o in outputs]
        after = Randomness.capture(self._device)
        self._calls.append(_Call(problem, arguments, structure, parameters, outputs, cut, output_structure, after))
        return tree_unflatten(cut, output_structure)

    @property
    def leaves(self) -> list[Tensor]:
        """The cached, detached outputs, with respect to which evaluations differentiate their loss."""
        if not self._calls:
            return []
        cached = [leaf for call in self._calls if call is not None for leaf in call.leaves]
        return [leaf for leaf in cached if isinstance(leaf, Tensor) and leaf.requires_grad]

    def pull(
        self, given: Sequence[Tensor | None], inputs: Sequence[Tensor], direct: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Backpropagate cotangents to ``inputs``, which are parameters of the problems read.

        Args:
            given: cotangents of the first of :attr:`leaves`.
            direct: cotangents of ``inputs`` to be added.
        """
        pulled: dict[Tensor, Tensor] = {}
        _add_to(pulled, (*self.leaves[: len(given)], *inputs), (*given, *direct))
        for call in reversed(self._calls):
            if call is None:
                continue
            pairs = [
                (output, pulled.pop(leaf))
                for output, leaf in zip(call.outputs, call.leaves, strict=True)
                if isinstance(leaf, Tensor) and leaf in pulled
            ]
            earlier = [a for a in call.arguments if isinstance(a, Tensor) and a.requires_grad]
            wanted = [*(p for p in call.parameters if p.requires_grad), *earlier]
            if pairs and wanted:
                outputs, cotangents = zip(*pairs, strict=True)
                found = torch.autograd.grad(outputs, wanted, cotangents, retain_graph=True, allow_unused=True)
                _add_to(pulled, wanted, found if self._device.type == "cpu" else aligned(found, wanted))
        return list(dense([pulled.get(tensor) for tensor in inputs]))


def _add_to(total: dict[Tensor, Tensor], keys: Sequence[Tensor], terms: Sequence[Tensor | None]) -> None:
    """Add each term to the entry of ``total`` under its key; None adds nothing."""
    for key, term in zip(keys, terms, strict=True):
        if term is not None:
            total[key] = total[key] + term if key in total else term


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and _plain(one) and bool(one == other))


def _plain(value: Any) -> bool:
    """Whether the value contains no tensors and can be compared with ``==``."""
    return value is None or isinstance(value, bool | int | float | complex | str | bytes)


def _among(tensor: Tensor, others: Sequence[Tensor]) -> bool:
    return any(tensor is other for other in others)
