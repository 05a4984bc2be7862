"""What plain torch says: the derivative of the upper loss through a training without mlo, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from .case import Case, whole

START = (0.875, 1.125)  # of the upper parameters; exact in every precision
ALONG = torch.tensor((0.6, -0.8), dtype=torch.float64)  # the direction of the derivative
SMALL = 1e-5  # of the central difference: its error is about 1e-9 of the derivative

Tensors = Mapping[str, Tensor]


class Plain:
    """What a loss calls instead of a problem."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.params = module, dict(module.named_parameters())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Functional:
    """The same with other parameters."""

    def __init__(self, module: nn.Module, params: Tensors) -> None:
        self.module, self.params = module, params

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self.module, self.params, args, kwargs)


def seed(number: int) -> None:
    """As torch.manual_seed, which takes a millisecond."""
    torch.default_generator.manual_seed(number)


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    """A context in which new tensors have this dtype."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def module_of(case: Case) -> nn.Module:
    seed(0)
    return case.module()


def batches_of(case: Case) -> list[Any]:
    """One for the lower level, one for the upper."""
    seed(1)
    return [case.x(), case.x()]


def step(case: Case, module: nn.Module, optimizer: Optimizer, s: Tensor, batch: Any) -> None:
    optimizer.zero_grad()
    case.fit(Plain(module), s, batch).backward()
    optimizer.step()


def warm_up(case: Case, module: nn.Module, optimizer: Optimizer, batch: Any) -> None:
    for _ in range(case.warm):
        step(case, module, optimizer, torch.ones(2), batch)


def copied(module: nn.Module) -> Tensors:
    """Its parameters and buffers."""
    tensors = module.state_dict().items()
    return {name: t.detach().clone() for name, t in tensors if isinstance(t, Tensor) and not is_lazy(t)}


def by_difference(case: Case, steps: int) -> tuple[Tensor, Tensors]:
    """The derivative along the direction, by a central difference, and the trained module's tensors."""

    def trained(s: Tensor) -> tuple[Tensor, Tensors]:
        with default(case.dtype):
            module = module_of(case)
        with default(torch.float64):
            if case.dtype != torch.float64:
                module = module.double()
            first, second = batches_of(case)
            optimizer = (case.plain or case.optimizer)(module.parameters())
            warm_up(case, module, optimizer, first)
            scheduler = case.scheduler(optimizer) if case.scheduler else None
            seed(2)
            for _ in range(steps):
                step(case, module, optimizer, s, first)
                if scheduler is not None:
                    scheduler.step()
            tensors = copied(module)
            seed(2)  # a hypergradient begins where the training of the lower level did
            with torch.no_grad():
                return case.judge(Plain(module), second).double(), tensors

    start = torch.tensor(START, dtype=torch.float64)
    (more, one), (less, other) = trained(start + SMALL * ALONG), trained(start - SMALL * ALONG)
    between = {name: t if whole(t) else (t + other[name]) / 2 for name, t in one.items()}
    return (more - less) / (2 * SMALL), between


def by_autograd(case: Case, steps: int) -> tuple[Tensor, Tensors]:
    """The same by autograd through steps of SGD, written out."""
    with default(torch.float64):
        module, (first, second) = module_of(case), batches_of(case)
        s = torch.tensor(START, requires_grad=True)
        parameters = dict(module.named_parameters())
        seed(2)
        for _ in range(steps):
            loss = case.fit(Functional(module, parameters), s, first)
            found = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
            parameters = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), found, strict=True)}
        seed(2)
        (gradient,) = torch.autograd.grad(case.judge(Functional(module, parameters), second), s)
    return gradient @ ALONG, {name: p.detach() for name, p in parameters.items()}
