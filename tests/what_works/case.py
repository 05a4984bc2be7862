"""A member of the table: a tiny two-level problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

TOLERANCE = 1e-6


def grid(*shape: int) -> Tensor:
    """Values that every precision represents exactly."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 5 % 16 - 7) / 8).to(torch.get_default_dtype()).reshape(shape)


def whole(tensor: Tensor) -> bool:
    """Whether it holds whole numbers or truth values."""
    return not (tensor.is_floating_point() or tensor.is_complex())


def scaled(x: Any, factor: Tensor) -> Any:
    """What of ``x`` is not whole, times a number."""
    return tree_map(lambda t: t * factor if isinstance(t, Tensor) and not whole(t) else t, x)


def flat(output: Any) -> Tensor:
    """The first tensor of an output, as a vector of real numbers."""
    tensor = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)


def fit(model: Any, s: Tensor, x: Any) -> Tensor:
    """The lower loss: inputs and outputs depend on the upper parameters ``s``."""
    output = flat(model(*scaled(x, s[1])))
    return (s[0] * output - torch.arange(len(output)).sin()).square().mean()


def judge(model: Any, x: Any) -> Tensor:
    """The upper loss: it depends on the upper parameters only through the training of ``model``."""
    return (flat(model(*x)) - 0.3).square().mean()


def sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A member of a family.

    Attributes:
        module: makes the lower module.
        x: makes a batch; the default losses call the module with it as arguments.
        fit, judge: the lower and the upper loss: of the lower problem, the upper parameters (``fit`` only), a batch.
        optimizer: makes the lower optimizer, of the module's parameters.
        scheduler: makes its scheduler.
        options: further arguments of the lower problem.
        warm: plain steps before, so that the optimizer has a state.
        dtype: that of the problem; plain torch always computes in float64.
        cast: the precision that the hypergradient is asked for.
        tolerance: relative, where the result is rounded, or an approximation.
        word: the verdict where it is within the tolerance.
        limits: {column: verdict if it is not exact there, and this is known}.
        by_autograd: compare with autograd through steps written out, where a difference would also see changes of what
            autograd holds constant.
        plain: makes the optimizer of the plain training, where torch cannot train with ``optimizer`` itself.
        note: what the table says besides.
    """

    family: str
    name: str
    module: Callable[[], nn.Module]
    x: Callable[[], Any] = lambda: (torch.randn(4, 3),)
    fit: Callable[[Any, Tensor, Any], Tensor] = fit
    judge: Callable[[Any, Any], Tensor] = judge
    optimizer: Callable[[Any], Optimizer] = sgd
    scheduler: Callable[[Optimizer], Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    warm: int = 0
    dtype: torch.dtype = torch.float64
    cast: torch.dtype | None = None
    tolerance: float = TOLERANCE
    word: str = "exact"
    limits: Mapping[str, str] = field(default_factory=dict)
    by_autograd: bool = False
    plain: Callable[[Any], Optimizer] | None = None
    note: str = ""


def cases(family: str, members: Mapping[str, Mapping[str, Any]]) -> list[Case]:
    """A case of each member: {name: arguments of a :class:`Case`}."""
    return [Case(family=family, name=name, **arguments) for name, arguments in members.items()]
