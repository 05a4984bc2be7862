"""The supernet against one written edge by edge, in CPU time and operators: the table in docs/search_spaces.md.

    python -m benchmarks.supernet

CPU time on one thread: all candidates take turns in one process, and the table shows the median over rounds. A search
step is one architecture step of second-order DARTS and one weight step, in plain PyTorch for all candidates. The
architecture step takes two gradients and a Hessian-vector product, which is exact or a central difference of two more
gradients. Images are contiguous, except for "its channels last": the supernet edge by edge with weights and images in
the channels-last format.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.edge_by_edge import EdgeByEdge, load_edges
from benchmarks.measuring import SEARCH_SPACES, cpu_seconds, write_table
from problems.nas import Architecture, Supernet

STEP, DECAY = 0.025, 3e-4
Weights = dict[str, Tensor]


class Search:
    """A search with one supernet: an architecture, a training batch and a validation batch."""

    def __init__(self, net: nn.Module, memory_format: torch.memory_format = torch.contiguous_format) -> None:
        self.net = net.to(memory_format=memory_format)
        torch.manual_seed(0)
        self.architecture = Architecture()
        self.batches = [(torch.randn(8, 3, 32, 32).to(memory_format=memory_format), torch.arange(8)) for _ in range(2)]

    def loss(self, weights: Weights, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The cross-entropy with these weights."""
        images, labels = batch
        return F.cross_entropy(functional_call(self.net, weights, (images, self.architecture())), labels)

    def weight_step(self) -> None:
        """Take one SGD step of the weights."""
        weights = dict(self.net.named_parameters())
        gradient = torch.autograd.grad(self.loss(weights, self.batches[0]), [*weights.values()])
        with torch.no_grad():
            for weight, derivative in zip(weights.values(), gradient, strict=True):
                weight.sub_(STEP * (derivative + DECAY * weight))

    def architecture_gradient(self, exact: bool) -> list[Tensor]:
        """The gradient through a virtual SGD step, with an exact or a central-difference product (DARTS, 2.3)."""
        weights, alphas = dict(self.net.named_parameters()), list(self.architecture.parameters())
        training = self.loss(weights, self.batches[0])
        gradient = torch.autograd.grad(training, [*weights.values()], create_graph=exact)
        pairs = zip(weights.items(), gradient, strict=True)
        stepped = {name: (w - STEP * (g + DECAY * w)).detach().requires_grad_() for (name, w), g in pairs}
        validation = self.loss(stepped, self.batches[1])
        direct = torch.autograd.grad(validation, [*alphas, *stepped.values()])
        vector = direct[len(alphas) :]
        if exact:
            product = torch.autograd.grad(gradient, alphas, vector)
        else:
            radius = 0.01 / torch.cat([v.flatten() for v in vector]).norm()
            sides = []
            for sign in (1, -1):
                moved = {n: w + sign * radius * v for (n, w), v in zip(weights.items(), vector, strict=True)}
                sides.append(torch.autograd.grad(self.loss(moved, self.batches[0]), alphas))
            product = tuple((plus - minus) / (2 * radius) for plus, minus in zip(*sides, strict=True))
        return [d - STEP * p for d, p in zip(direct, product, strict=False)]


class OperatorCount(TorchDispatchMode):
    """Counts the operators that are dispatched."""

    count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the operator and run it."""
        self.count += 1
        return operator(*args, **(kwargs or {}))


def operators(search: Search) -> int:
    """The number of operators of one forward pass."""
    with OperatorCount() as counter:
        search.loss({}, search.batches[0])
    return counter.count


def table(rounds: int) -> str:
    """Measure, and return the table in Markdown."""
    torch.set_num_threads(1)
    supernet = Supernet()
    nets = [EdgeByEdge(), EdgeByEdge(), supernet]
    for net in nets[:2]:
        load_edges(net, supernet)
    searches = [Search(nets[0]), Search(nets[1], torch.channels_last), Search(supernet)]
    losses = [search.loss({}, search.batches[0]) for search in searches]
    assert torch.allclose(losses[0], losses[2], rtol=1e-4), "the supernets differ"

    def step(search: Search, exact: bool) -> Callable[[], None]:
        return lambda: (search.architecture_gradient(exact), search.weight_step())[1]

    def forward(search: Search) -> Callable[[], object]:
        return torch.no_grad()(lambda: search.loss({}, search.batches[0]))

    rows = {
        "forward pass": [forward(search) for search in searches],
        "weight step": [search.weight_step for search in searches],
        "search step, central difference": [step(search, False) for search in searches],
        "search step, exact product": [step(search, True) for search in searches],
    }
    lines = ["| | edge by edge | its channels last | supernet | ratio |", "| --- | --- | --- | --- | --- |"]
    counts = [operators(search) for search in searches]
    lines.append(
        f"| operators of a forward pass | {counts[0]} | {counts[1]} | {counts[2]} | {counts[2] / counts[0]:.2f} |"
    )
    for name, candidates in rows.items():
        seconds = cpu_seconds(candidates, rounds)
        cells = " | ".join(f"{value:.2f} s" for value in seconds)
        lines.append(f"| {name} | {cells} | {seconds[2] / seconds[0]:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    write_table(__doc__, table, SEARCH_SPACES, "supernet")
