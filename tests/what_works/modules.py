"""Modules and losses as people have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .case import Case, cases, fit


class Net(nn.Module):
    """Two layers, and what a subclass does with them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("gain", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).tanh() * self.gain)


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.two.weight = self.one.weight


class FrozenPart(Net):
    def __init__(self) -> None:
        super().__init__()
        self.one.requires_grad_(False)


class Unused(Net):
    def __init__(self) -> None:
        super().__init__()
        self.three = nn.Linear(3, 3)


class BufferInPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.gain.mul_(1.1)
        return super().forward(x)


class BufferReplaced(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.gain = self.gain * 0.9 + x.detach().mean(0) * 0.1
        return super().forward(x)


class BufferMade(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("late", None)

    def forward(self, x: Tensor) -> Tensor:
        self.late = x.detach().mean(0)
        return super().forward(x + self.late)


class Clamping(Net):
    """Changes its own parameters while it runs."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.one.weight.clamp_(-0.4, 0.4)
        return super().forward(x)


class Initializing(Net):
    """Sets its parameters from its first batch."""

    done = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.done:
            with torch.no_grad():
                self.one.bias.copy_(-x.mean(0))
            self.done = True
        return super().forward(x)


class Parts(nn.Module):
    """Parameters in containers, some by number and some by name."""

    def __init__(self) -> None:
        super().__init__()
        self.listed = nn.ParameterList([torch.randn(3, 3), torch.randn(3)])
        self.named = nn.ParameterDict({"a": torch.randn(3, 3)})
        self.modules_by_name = nn.ModuleDict({"b": nn.Linear(3, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return self.modules_by_name["b"](torch.tanh(x @ self.listed[0] + self.listed[1]) @ self.named["a"])


class Routed(nn.Module):
    """A mixture of experts, of which values choose one for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.gate = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)]), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        chosen = weights.argmax(-1)
        rows = [self.experts[int(e)](row) * w[e] for row, w, e in zip(x, weights, chosen, strict=True)]
        return torch.stack(rows).tanh()


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def called(module: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The module after it was called once, which lazy layers need."""

    def make() -> nn.Module:
        made = module()
        made(torch.randn(2, 3))
        return made

    return make


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(4), nn.Tanh())


def compiled(backend: str) -> nn.Module:
    return torch.compile(Net(), backend=backend)


def own(loss: Callable[..., Tensor]) -> dict[str, Any]:
    return {"module": Net, "fit": loss}


def penalized(model: Any, s: Tensor, x: Any) -> Tensor:
    return fit(model, s, x) + s[1] * sum(p.square().sum() for p in model.params.values())


def in_eval(model: Any, s: Tensor, x: Any) -> Tensor:
    model.module.eval()
    return fit(model, s, x)


def beside(model: Any, s: Tensor, x: Any) -> Tensor:
    """Uses a weight of the module itself instead of the problem's."""
    return fit(model, s, x) + s[1] * model.module.one.weight.square().sum()


MODULES = {
    name: {"module": module}
    for name, module in {
        "tied parameters": Tied,
        "frozen parameters": FrozenPart,
        "unused parameters": Unused,
        "ParameterList, ParameterDict, ModuleDict": Parts,
        "routing by values": Routed,
        "buffers changed in place": BufferInPlace,
        "a buffer filled in forward": BufferMade,
        "parameters clamped in forward": Clamping,
        "parameters initialized by the first batch": Initializing,
        "checkpointed activations": Checkpointed,
        "lazy layers (called before)": called(lazy),
        "lazy layers (not called yet)": lazy,
        "DataParallel": lambda: nn.DataParallel(Net()),
    }.items()
} | {
    "buffers replaced": {"module": BufferReplaced, "by_autograd": True, "note": "buffers are constants"},
    "a penalty on self.params": own(penalized),
    "a loss that calls eval()": own(in_eval),
    "a loss that uses self.module.weight": own(beside),
}

TRACED = {
    name: {"module": module}
    for name, module in {
        "torch.jit.script": lambda: torch.jit.script(Net()),
        "torch.jit.trace": lambda: torch.jit.trace(Net(), torch.randn(4, 3)),
        "torch.export": lambda: torch.export.export(Net(), (torch.randn(4, 3),)).module(),
        "torch.fx": lambda: torch.fx.symbolic_trace(Net()),
        "torch.compile (backend eager)": lambda: compiled("eager"),
        "torch.compile (backend aot_eager)": lambda: compiled("aot_eager"),
    }.items()
}

CASES: list[Case] = [
    *cases("Modules and losses", MODULES),
    *cases("Scripted, traced and compiled modules", TRACED),
]
