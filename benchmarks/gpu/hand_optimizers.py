"""SGD with clipping and its transpose, and Adam, over all tensors of a level at once, without a read on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.lbt_step import DECAY, MOMENTUM, STEP

Vector = Sequence[Tensor]
_OFF_ZERO = 1e-6  # as in torch.nn.utils.clip_grad_norm_


def norm(vector: Vector) -> Tensor:
    """The Euclidean norm, a scalar tensor."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(vector)))


def in_order_of(parameters: Vector, gradient: Vector) -> list[Tensor]:
    """A gradient whose tensors are in memory as the parameters are, so that one kernel goes through all of them.

    Where only dimensions of size 1 have other strides, as in depthwise weights, this costs nothing.
    """
    found = []
    for parameter, part in zip(parameters, gradient, strict=True):
        if part.stride() != parameter.stride():
            same = _strides(part) == _strides(parameter)
            part = part.as_strided(parameter.shape, parameter.stride()) if same else part.contiguous()
        found.append(part)
    return found


def _strides(tensor: Tensor) -> list[int]:
    """Those of the dimensions that are larger than 1."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


class Clipped(NamedTuple):
    """A gradient scaled down to a largest norm.

    Attributes:
        value: the clipped gradient.
        before: the gradient.
        size: its norm; None if it is not clipped.
        largest: the largest norm.
    """

    value: Vector
    before: Vector
    size: Tensor | None = None
    largest: float = float("inf")

    @staticmethod
    def of(gradient: Vector, largest: float | None) -> Clipped:
        """The gradient with a norm of at most ``largest`` (None: as it is)."""
        if largest is None:
            return Clipped(gradient, gradient)
        size = norm(gradient)
        scale = (largest / (size + _OFF_ZERO)).clamp(max=1.0)
        return Clipped(torch._foreach_mul(gradient, scale), gradient, size, largest)

    def transpose(self, cotangent: Vector) -> Vector:
        """The cotangent of the gradient: s (u - g <g, u> / (|g| (|g| + e))), with s = c / (|g| + e), if it was longer.

        A correction of rank one: three operations over all tensors.
        """
        if self.size is None:
            return cotangent
        scale = self.largest / (self.size + _OFF_ZERO)
        along = torch.cat([product.flatten() for product in torch._foreach_mul(cotangent, self.before)]).sum()
        tiny = torch.finfo(self.size.dtype).tiny
        share = scale * along / (self.size * (self.size + _OFF_ZERO)).clamp(min=tiny)
        share = torch.where(scale < 1.0, share, 0.0)
        back = torch._foreach_mul(cotangent, scale.clamp(max=1.0))
        return torch._foreach_sub(back, torch._foreach_mul(self.before, share))


class Sgd:
    """SGD with momentum and weight decay for the parameters of a module; the learning rate is a tensor."""

    def __init__(self, module: nn.Module, clip_norm: float | None) -> None:
        self.parameters = list(module.parameters())
        self.clip_norm = clip_norm
        self.rate = torch.full_like(self.parameters[0][(0,) * self.parameters[0].dim()], STEP)
        self._momenta = [torch.zeros_like(parameter) for parameter in self.parameters]

    def clipped(self, gradient: Vector) -> Clipped:
        """The gradient with a norm of at most ``clip_norm``."""
        return Clipped.of(in_order_of(self.parameters, gradient), self.clip_norm)

    def virtual(self, gradient: Clipped) -> list[Tensor]:
        """Where a step leads, as leaves of a new graph; nothing changes."""
        along = torch._foreach_add(gradient.value, self.parameters, alpha=DECAY)
        torch._foreach_add_(along, torch._foreach_mul(self._momenta, MOMENTUM))
        moved = torch._foreach_sub(self.detached(), torch._foreach_mul(along, self.rate))
        return [parameter.requires_grad_() for parameter in moved]

    def pulled(self, cotangent: Vector, gradient: Clipped) -> Vector:
        """The cotangent of the gradient, from that of where the step leads."""
        return gradient.transpose(torch._foreach_mul(cotangent, -self.rate))

    @torch.no_grad()
    def step(self, gradient: Clipped) -> None:
        """Take a step in place."""
        torch._foreach_mul_(self._momenta, MOMENTUM)
        torch._foreach_add_(self._momenta, gradient.value)
        torch._foreach_add_(self._momenta, self.parameters, alpha=DECAY)
        torch._foreach_sub_(self.parameters, torch._foreach_mul(self._momenta, self.rate))

    def detached(self) -> list[Tensor]:
        """The parameters without a graph."""
        return [parameter.detach() for parameter in self.parameters]


class Adam:
    """Adam with weight decay in the gradient; the number of steps is a tensor."""

    def __init__(
        self, module: nn.Module, rate: float = 3e-4, betas: tuple[float, float] = (0.5, 0.999), decay: float = 1e-3
    ) -> None:
        self.parameters = list(module.parameters())
        self._rate, self._betas, self._decay = rate, betas, decay
        self._means = [torch.zeros_like(parameter) for parameter in self.parameters]
        self._squares = [torch.zeros_like(parameter) for parameter in self.parameters]
        self._count = torch.zeros_like(self.parameters[0][0, 0])

    @torch.no_grad()
    def step(self, gradient: Vector) -> None:
        """Take a step in place."""
        first, second = self._betas
        self._count.add_(1)
        gradient = torch._foreach_add(gradient, self.parameters, alpha=self._decay)
        torch._foreach_lerp_(self._means, gradient, 1 - first)
        torch._foreach_mul_(self._squares, second)
        torch._foreach_addcmul_(self._squares, gradient, gradient, 1 - second)
        root = torch._foreach_div(torch._foreach_sqrt(self._squares), (1 - second**self._count).sqrt())
        torch._foreach_add_(root, 1e-8)
        along = torch._foreach_mul(torch._foreach_div(self._means, root), self._rate / (1 - first**self._count))
        torch._foreach_sub_(self.parameters, along)
