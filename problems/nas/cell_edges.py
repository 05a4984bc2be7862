"""All edges that leave one state of a supernet's cell, computed together: one kernel for each kind of operation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from problems.nas.grouped_convolutions import GroupedConvolutions, GroupedFactorizedReduce, ScaledNorm, pixels_of
from problems.nas.operation_names import NOISE, NONE


def _average_pool(features: Tensor, size: int, stride: int, padding: int) -> Tensor:
    return F.avg_pool2d(features, size, stride, padding, count_include_pad=False)


_POOLS: dict[str, Callable[[Tensor, int, int, int], Tensor]] = {
    "max_pool_3x3": F.max_pool2d,
    "avg_pool_3x3": _average_pool,
}
_KERNELS = {"sep_conv_3x3": (3, 1), "sep_conv_5x5": (5, 1), "dil_conv_3x3": (3, 2), "dil_conv_5x5": (5, 2)}
"""The kernel size and the dilation of each convolution."""


class GroupedEdges(nn.Module):
    """The edges that leave one state; each computes a weighted sum of operations on it (DARTS, equation 2).

    Operations without parameters (pools with their batch norms, the identity) are computed once, and a small matrix
    product mixes them for each edge. Each operation with parameters is one kernel for all edges that have it, with
    the edges' channels side by side; its last batch norm applies the weights. "noise" is drawn separately for each
    edge. "none" contributes nothing.

    Args:
        edges: maps each edge, given by its row in the weights, to its operations.
        columns: the operations in the order of the weights' columns.
        channels: the number of channels of the state, and of each edge's output.
        stride: the stride of every operation.
    """

    shared_index: Tensor
    scale_index: Tensor
    noise_index: Tensor

    def __init__(
        self, edges: Mapping[int, Collection[str]], columns: Sequence[str], channels: int, stride: int
    ) -> None:
        super().__init__()
        self.edges, self.channels, self.stride = dict(edges), channels, stride
        names = [name for name in columns if name != NONE and any(name in operations for operations in edges.values())]
        identity = ["skip_connect"] if stride == 1 and "skip_connect" in names else []
        self.shared = [*(name for name in names if name in _POOLS), *identity]
        positions = {
            name: tuple(position for position, operations in enumerate(edges.values()) if name in operations)
            for name in names
        }
        self.noise_positions = positions.get(NOISE, ())
        self.positions = {name: where for name, where in positions.items() if name not in (*self.shared, NOISE)}
        self.norms = nn.ModuleDict({name: ScaledNorm(channels) for name in self.shared if name in _POOLS})
        self.branches = nn.ModuleDict({name: self._branch(name, len(where)) for name, where in self.positions.items()})

        def index(row: int, name: str) -> int:
            return row * len(columns) + columns.index(name)

        shared = [[index(row, name) for name in self.shared] for row in self.edges]
        self.register_buffer("shared_index", torch.tensor(shared, dtype=torch.long), persistent=False)
        scales = [index(row, name) for name in self.positions for row, names in edges.items() if name in names]
        repeated = torch.tensor(scales, dtype=torch.long).repeat_interleave(channels)
        self.register_buffer("scale_index", repeated, persistent=False)
        noises = [index(row, NOISE) for row, operations in edges.items() if NOISE in operations]
        self.register_buffer("noise_index", torch.tensor(noises, dtype=torch.long), persistent=False)

    def _branch(self, name: str, count: int) -> nn.Module:
        if name == "skip_connect":
            return GroupedFactorizedReduce(self.channels, count)
        kernel, dilation = _KERNELS[name]
        return GroupedConvolutions(self.channels, count, kernel, self.stride, dilation)

    def forward(self, state: Tensor, weights: Tensor, skip_dropout: float) -> list[list[Tensor]]:
        """Return, for each edge, the terms of its sum, each of shape (N, H', W', channels).

        Args:
            state: (N, channels, H, W).
            weights: the operation weights of the whole cell, (edges of the cell, operations).
            skip_dropout: in training, the probability with which each edge drops values of its identity.
        """
        terms: list[list[Tensor]] = [[] for _ in self.edges]
        for mixed in self._mixtures(state, weights, skip_dropout):
            for edge_terms, term in zip(terms, mixed.unbind(), strict=True):
                edge_terms.append(term)
        if self.branches:
            for positions, output in self._branch_sums(F.relu(state), weights).items():
                for position, part in zip(positions, pixels_of(output).split(self.channels, dim=-1), strict=True):
                    terms[position].append(part)
        if self.noise_positions:
            for position, noise in zip(self.noise_positions, self._noise(state, weights).unbind(), strict=True):
                terms[position].append(noise)
        return terms

    def _branch_sums(self, rectified: Tensor, weights: Tensor) -> dict[tuple[int, ...], Tensor]:
        """Run all branches; sum the outputs of those that are on the same edges, (N, edges x channels, H', W')."""
        counts = {name: len(positions) for name, positions in self.positions.items()}
        copies = {count: torch.cat([rectified] * count, dim=1) for count in set(counts.values())}
        scales = weights.take(self.scale_index).split([count * self.channels for count in counts.values()])
        sums: dict[tuple[int, ...], Tensor] = {}
        for (name, positions), scale in zip(self.positions.items(), scales, strict=True):
            features = rectified if name == "skip_connect" else copies[counts[name]]
            output = self.branches[name](features, scale)
            sums[positions] = sums[positions] + output if positions in sums else output
        return sums

    def _mixtures(self, state: Tensor, weights: Tensor, skip_dropout: float) -> Iterator[Tensor]:
        """Mix the shared operations for each edge, (edges, N, H', W', channels).

        Under dropout the identity is yielded separately, since each edge drops other values of it.
        """
        names, matrix = self.shared, weights.take(self.shared_index)
        if self.training and skip_dropout > 0 and "skip_connect" in names:
            *names, _ = names
            copies = pixels_of(state).expand(len(self.edges), -1, -1, -1, -1)
            yield F.dropout(copies, skip_dropout) * matrix[:, -1, None, None, None, None]
            matrix = matrix[:, :-1]
        if names:
            stacked = pixels_of(torch.cat([self._apply_shared(name, state) for name in names]))
            mixed = matrix @ stacked.reshape(len(names), -1)
            yield mixed.view(-1, len(stacked) // len(names), *stacked.shape[1:])

    def _noise(self, state: Tensor, weights: Tensor) -> Tensor:
        """Draw standard normal noise for each edge that has it, times its weight, (edges, N, H', W', channels)."""
        samples, channels, *sizes = state.shape
        height, width = (-(-size // self.stride) for size in sizes)
        shape = len(self.noise_positions), samples, height, width, channels
        noise = torch.randn(shape, dtype=state.dtype, device=state.device)
        return noise * weights.take(self.noise_index)[:, None, None, None, None]

    def _apply_shared(self, name: str, state: Tensor) -> Tensor:
        return cast(Tensor, self.norms[name](_POOLS[name](state, 3, self.stride, 1))) if name in _POOLS else state

    def edge_tensors(self) -> Iterator[tuple[int, str, str, Tensor]]:
        """Yield (edge, operation, name, view) for all weights and running statistics.

        The names are those in the module that `make_operation` builds for one edge.
        """
        for name, norm in self.norms.items():
            for edge in (edge for edge, operations in self.edges.items() if name in operations):
                for kind, buffer in norm.named_buffers():
                    yield edge, name, f"1.{kind}", buffer
        for name, branch in self.branches.items():
            edges = [edge for edge, operations in self.edges.items() if name in operations]
            for path, tensor in (*branch.named_parameters(), *branch.named_buffers()):
                pieces = tensor.detach().unflatten(0, (len(edges), -1))
                for edge, piece in zip(edges, pieces, strict=True):
                    yield edge, name, _name_on_edge(path), piece


def _name_on_edge(path: str) -> str:
    """Turn "stages.1.pointwise.weight" into "6.weight", its index in [ReLU, depthwise, pointwise, norm] x 2."""
    if not path.startswith("stages."):
        return path
    _, stage, layer, kind = path.split(".")
    return f"{4 * int(stage) + ('depthwise', 'pointwise', 'norm').index(layer) + 1}.{kind}"
