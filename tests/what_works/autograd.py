"""Losses that use torch.func, autograd, checkpointing, or operators of a user's own, with a small network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from .case import Case, cases
from .operators import CONSTANT


class Using(nn.Module):
    """A network that passes its own layer to what uses it."""

    def __init__(self, use: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> None:
        super().__init__()
        self.layers, self.use = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.layers, x)


def using(use: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> dict[str, Any]:
    return {"module": lambda: Using(use), "x": lambda: (torch.randn(4, 4),)}


class Twice(torch.autograd.Function):
    """A square whose backward is differentiable."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Once(Twice):
    """A square whose backward torch is told not to differentiate."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Forward(Twice):
    """A square with a forward derivative too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, t):
        return 2 * ctx.saved_tensors[0] * t


@torch.library.custom_op("what_works::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    return x**3


cube.register_autograd(
    lambda ctx, g: 3 * ctx.saved_tensors[0] ** 2 * g,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("what_works::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    return x**3


@torch.library.custom_op("what_works::opaque_backward", mutates_args=())
def opaque_backward(x: Tensor, g: Tensor) -> Tensor:
    return 3 * x**2 * g


opaque.register_autograd(
    lambda ctx, g: opaque_backward(ctx.saved_tensors[0], g),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def saved(h: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        return h.exp() * h


def on_cpu(h: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return h.exp() * h


def penalty(layers: Callable[[Tensor], Tensor], x: Tensor, **options: Any) -> Tensor:
    """The gradient of a network's outputs with respect to its inputs."""
    with torch.enable_grad():
        at = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(layers(at).square().sum(), at, **options)[0] + layers(x)


def hooked(h: Tensor) -> Tensor:
    if h.requires_grad:
        h.register_hook(lambda g: g.clamp(-0.1, 0.1) * 0.5)
    return h


USING = {
    "torch.func": {
        "grad": lambda net, x: grad(lambda z: net(z).square().sum())(x),
        "vjp": lambda net, x: (lambda out, pull: pull(out.cos())[0])(*vjp(net, x)),
        "jvp": lambda net, x: jvp(net, (x,), (x.cos(),))[1],
        "jacrev": lambda net, x: jacrev(net)(x[0]),
        "jacfwd": lambda net, x: jacfwd(net)(x[0]),
        "hessian": lambda net, x: hessian(lambda z: net(z).sum())(x[0]),
        "vmap": lambda net, x: vmap(net)(x),
        "vmap of grad": lambda net, x: vmap(grad(lambda z: net(z).square().sum()))(x),
        "functional_call": lambda net, x: functional_call(net, {n: p.sin() for n, p in net.named_parameters()}, (x,)),
    },
    "Autograd inside a loss": {
        "autograd.grad with create_graph=True": lambda net, x: penalty(net, x, create_graph=True),
        "autograd.grad without create_graph": lambda net, x: penalty(net, x, retain_graph=True),
        "autograd.functional.jacobian": lambda net, x: torch.autograd.functional.jacobian(net, x[0], create_graph=True),
        "detach, no_grad": lambda net, x: net(x) * net(x).detach().sin(),
        "straight-through estimator": lambda net, x: net(x).round() + net(x) - net(x).detach(),
        "saved_tensors_hooks": lambda net, x: saved(net(x)),
        "save_on_cpu": lambda net, x: on_cpu(net(x)),
        "Tensor.register_hook": lambda net, x: hooked(net(x)),
    },
    "Activation checkpointing": {
        "checkpoint (use_reentrant=False)": lambda net, x: checkpoint(net, x, use_reentrant=False),
        "checkpoint (use_reentrant=True)": lambda net, x: checkpoint(net, x, use_reentrant=True),
    },
    "Operators of your own": {
        "autograd.Function": lambda net, x: Twice.apply(net(x)),
        "autograd.Function with once_differentiable": lambda net, x: Once.apply(net(x)),
        "autograd.Function with jvp": lambda net, x: Forward.apply(net(x)),
        "custom_op with a differentiable backward": lambda net, x: cube(net(x)),
        "custom_op with an opaque backward": lambda net, x: opaque(net(x)),
    },
}


ONLY_EXACT = {"by_autograd": True, "limits": {"product `forward`": "not exact"}}
UNSYMMETRIC = "`forward` assumes that the gradient is one of a loss"
MORE: dict[str, dict[str, Any]] = {
    "detach, no_grad": CONSTANT,
    "straight-through estimator": CONSTANT,
    "autograd.grad without create_graph": ONLY_EXACT | {"note": f"a constant, as in autograd; {UNSYMMETRIC}"},
    "Tensor.register_hook": ONLY_EXACT | {"note": UNSYMMETRIC},
}

CASES: list[Case] = [
    case
    for family, members in USING.items()
    for case in cases(family, {name: using(use) | MORE.get(name, {}) for name, use in members.items()})
]
