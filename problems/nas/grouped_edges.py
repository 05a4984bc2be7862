"""All edges of a supernet's cell that leave one state, computed together: one kernel a kind of operation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from problems.nas.convolution import convolve
from problems.nas.operation_names import NOISE, NONE


def _average_pool(features: Tensor, size: int, stride: int, padding: int) -> Tensor:
    return F.avg_pool2d(features, size, stride, padding, count_include_pad=False)


_POOLS: dict[str, Callable[[Tensor, int, int, int], Tensor]] = {
    "max_pool_3x3": F.max_pool2d,
    "avg_pool_3x3": _average_pool,
}
_KERNELS = {"sep_conv_3x3": (3, 1), "sep_conv_5x5": (5, 1), "dil_conv_3x3": (3, 2), "dil_conv_5x5": (5, 2)}
"""Size and dilation."""


class ScaledNorm(nn.Module):
    """Batch norm whose scale is given at each call, which weighs features and normalizes them in one kernel."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, features: Tensor, scale: Tensor | None = None) -> Tensor:
        """Normalize (N, C, H, W); multiply by `scale`, (C)."""
        return F.batch_norm(features, self.running_mean, self.running_var, scale, None, self.training)


def pixels_of(features: Tensor) -> Tensor:
    """View (N, C, H, W) as (N, H, W, C), the order of a channels-last tensor in memory."""
    return features.permute(0, 2, 3, 1)


class Stage(nn.Module):
    """Depthwise convolution, 1x1 convolution and batch norm of `count` edges side by side, `channels` wide each."""

    def __init__(self, channels: int, count: int, kernel: int, stride: int, dilation: int) -> None:
        super().__init__()
        wide, padding = count * channels, dilation * (kernel // 2)
        self.count = count
        self.depthwise = nn.Conv2d(wide, wide, kernel, stride, padding, dilation, groups=wide, bias=False)
        self.pointwise = nn.Conv2d(wide, wide, 1, groups=count, bias=False)
        self.norm = ScaledNorm(wide)

    def forward(self, features: Tensor, scale: Tensor | None = None) -> Tensor:
        """Map (N, count x channels, H, W) to the like, H and W divided by the stride and rounded up."""
        stride, dilation = self.depthwise.stride[0], self.depthwise.dilation[0]
        weight, groups = self.depthwise.weight, self.depthwise.groups
        if stride == 1:
            features = convolve(features, weight, dilation, groups)
        elif stride == dilation:  # reads every other pixel, and between those there are no gaps
            features = convolve(features[:, :, ::stride, ::stride], weight, 1, groups)
        else:
            features = self.depthwise(features)
        return cast(Tensor, self.norm(convolve(features, self.pointwise.weight, groups=self.count), scale))


class Convolutions(nn.Module):
    """A separable or a dilated convolution on `count` edges: stages with ReLUs between them."""

    def __init__(self, channels: int, count: int, kernel: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Stage(channels, count, kernel, stride, dilation)])
        if dilation == 1:
            self.stages.append(Stage(channels, count, kernel, 1, 1))

    def forward(self, rectified: Tensor, scale: Tensor) -> Tensor:
        """Map features after their ReLU, (N, count x channels, H, W), to the like, times `scale`."""
        *before, last = self.stages
        for stage in before:
            rectified = F.relu(stage(rectified))
        return cast(Tensor, last(rectified, scale))


class FactorizedReductions(nn.Module):
    """The skip-connection of stride 2 on `count` edges; see :class:`problems.nas.operations.FactorizedReduce`."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.halves = (channels // 2, channels - channels // 2)
        self.channels, self.count = channels, count
        self.aligned = nn.Conv2d(channels, count * self.halves[0], 1, stride=2, bias=False)
        self.shifted = nn.Conv2d(channels, count * self.halves[1], 1, stride=2, bias=False)
        self.norm = ScaledNorm(count * channels)

    def forward(self, rectified: Tensor, scale: Tensor) -> Tensor:
        """Map features after their ReLU, (N, channels, H, W), to (N, count x channels, ceil(H/2), ceil(W/2))."""
        height, width = rectified.shape[2:]
        shifted = self.shifted(F.pad(rectified, (-1, width % 2, -1, height % 2)))
        pairs = zip((self.aligned(rectified), shifted), self.halves, strict=True)
        both = [pixels_of(features).unflatten(-1, (self.count, half)) for features, half in pairs]
        return cast(Tensor, self.norm(torch.cat(both, dim=-1).flatten(-2).permute(0, 3, 1, 2), scale))


class Fan(nn.Module):
    """The edges that leave one state: each a sum of operations on it, weighted (DARTS, equation 2).

    What has no parameters (pools with their batch norms, the identity) is computed once and mixed by a small matrix,
    one row an edge. What has is one kernel for all edges, whose channels lie side by side, edge after edge, and the
    last batch norm applies the weights. "noise" is drawn for each edge anew. "none" contributes nothing.

    Args:
        edges: {row of an edge in the weights: its operations}.
        columns: the operations in the order of the weights' columns.
        channels: those of the state and of each edge.
        stride: of every operation.
    """

    matrix: Tensor
    scales: Tensor
    noises: Tensor

    def __init__(
        self, edges: Mapping[int, Collection[str]], columns: Sequence[str], channels: int, stride: int
    ) -> None:
        super().__init__()
        self.edges, self.channels, self.stride = dict(edges), channels, stride
        names = [name for name in columns if name != NONE and any(name in operations for operations in edges.values())]
        identity = ["skip_connect"] if stride == 1 and "skip_connect" in names else []
        self.shared = [*(name for name in names if name in _POOLS), *identity]
        places = {
            name: tuple(place for place, operations in enumerate(edges.values()) if name in operations)
            for name in names
        }
        self.noisy = places.get(NOISE, ())
        self.owners = {name: own for name, own in places.items() if name not in (*self.shared, NOISE)}
        self.norms = nn.ModuleDict({name: ScaledNorm(channels) for name in self.shared if name in _POOLS})
        self.branches = nn.ModuleDict({name: self._branch(name, len(owners)) for name, owners in self.owners.items()})

        def index(row: int, name: str) -> int:
            return row * len(columns) + columns.index(name)

        matrix = [[index(row, name) for name in self.shared] for row in self.edges]
        scaled = [index(row, name) for name in self.owners for row, operations in edges.items() if name in operations]
        self.register_buffer("matrix", torch.tensor(matrix, dtype=torch.long), persistent=False)
        scales = torch.tensor(scaled, dtype=torch.long).repeat_interleave(channels)
        self.register_buffer("scales", scales, persistent=False)
        noises = [index(row, NOISE) for row, operations in edges.items() if NOISE in operations]
        self.register_buffer("noises", torch.tensor(noises, dtype=torch.long), persistent=False)

    def _branch(self, name: str, count: int) -> nn.Module:
        if name == "skip_connect":
            return FactorizedReductions(self.channels, count)
        kernel, dilation = _KERNELS[name]
        return Convolutions(self.channels, count, kernel, self.stride, dilation)

    def forward(self, state: Tensor, weights: Tensor, skip_dropout: float) -> list[list[Tensor]]:
        """Return for each edge the terms of its sum, each (N, H', W', channels); `weights` are the whole cell's.

        In training, each edge drops values behind its identity with probability `skip_dropout`.
        """
        terms: list[list[Tensor]] = [[] for _ in self.edges]
        for mixed in self._mixtures(state, weights, skip_dropout):
            for own, term in zip(terms, mixed.unbind(), strict=True):
                own.append(term)
        if self.branches:
            for owners, output in self._branch_sums(F.relu(state), weights).items():
                for place, part in zip(owners, pixels_of(output).split(self.channels, dim=-1), strict=True):
                    terms[place].append(part)
        if self.noisy:
            for place, noise in zip(self.noisy, self._noise(state, weights).unbind(), strict=True):
                terms[place].append(noise)
        return terms

    def _branch_sums(self, rectified: Tensor, weights: Tensor) -> dict[tuple[int, ...], Tensor]:
        """Run all branches; sum those that are on the same edges, (N, edges x channels, H', W')."""
        counts = {name: len(owners) for name, owners in self.owners.items()}
        copies = {count: torch.cat([rectified] * count, dim=1) for count in set(counts.values())}
        scales = weights.take(self.scales).split([count * self.channels for count in counts.values()])
        sums: dict[tuple[int, ...], Tensor] = {}
        for (name, owners), scale in zip(self.owners.items(), scales, strict=True):
            features = rectified if name == "skip_connect" else copies[counts[name]]
            output = self.branches[name](features, scale)
            sums[owners] = sums[owners] + output if owners in sums else output
        return sums

    def _mixtures(self, state: Tensor, weights: Tensor, skip_dropout: float) -> Iterator[Tensor]:
        """Mix what is shared, (edges, N, H', W', channels); the identity by itself where each edge drops out of it."""
        names, matrix = self.shared, weights.take(self.matrix)
        if self.training and skip_dropout > 0 and "skip_connect" in names:
            *names, _ = names
            copies = pixels_of(state).expand(len(self.edges), -1, -1, -1, -1)
            yield F.dropout(copies, skip_dropout) * matrix[:, -1, None, None, None, None]
            matrix = matrix[:, :-1]
        if names:
            stacked = pixels_of(torch.cat([self._share(name, state) for name in names]))
            mixed = matrix @ stacked.reshape(len(names), -1)
            yield mixed.view(-1, len(stacked) // len(names), *stacked.shape[1:])

    def _noise(self, state: Tensor, weights: Tensor) -> Tensor:
        """Draw standard normal noise for each edge that has it, times its weight, (edges, N, H', W', channels)."""
        samples, channels, *sizes = state.shape
        height, width = (-(-size // self.stride) for size in sizes)
        shape = len(self.noisy), samples, height, width, channels
        noise = torch.randn(shape, dtype=state.dtype, device=state.device)
        return noise * weights.take(self.noises)[:, None, None, None, None]

    def _share(self, name: str, state: Tensor) -> Tensor:
        return cast(Tensor, self.norms[name](_POOLS[name](state, 3, self.stride, 1))) if name in _POOLS else state

    def edge_tensors(self) -> Iterator[tuple[int, str, str, Tensor]]:
        """Yield (edge, operation, name, view) of all weights and statistics, named as in `make_operation`."""
        for name, norm in self.norms.items():
            for edge in (edge for edge, operations in self.edges.items() if name in operations):
                for kind, buffer in norm.named_buffers():
                    yield edge, name, f"1.{kind}", buffer
        for name, branch in self.branches.items():
            owners = [edge for edge, operations in self.edges.items() if name in operations]
            for path, tensor in (*branch.named_parameters(), *branch.named_buffers()):
                pieces = tensor.detach().unflatten(0, (len(owners), -1))
                for edge, piece in zip(owners, pieces, strict=True):
                    yield edge, name, _name_on_edge(path), piece


def _name_on_edge(path: str) -> str:
    """Turn "stages.1.pointwise.weight" into "6.weight", its place among [ReLU, depthwise, pointwise, norm] twice."""
    if not path.startswith("stages."):
        return path
    _, stage, layer, kind = path.split(".")
    return f"{4 * int(stage) + ('depthwise', 'pointwise', 'norm').index(layer) + 1}.{kind}"
