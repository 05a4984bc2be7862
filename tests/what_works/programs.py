"""What batches, precisions and whole modules people have."""

from __future__ import annotations

from collections import OrderedDict, UserDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.optim import Adam
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.data import DataLoader

from .case import Case, cases, fit, grid, judge

IN_DOUBLE = {"dtype": torch.float32, "cast": torch.float64, "tolerance": 1e-5}


class Named(NamedTuple):
    x: Tensor
    label: str


@dataclass
class Data:
    x: Tensor
    label: str = "a"


@dataclass(frozen=True)
class Frozen:
    x: Tensor


class Holder:
    """A batch of a class that mlo does not know."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh())


def holding(make: Callable[[Tensor], Any], get: Callable[[Any], Tensor], **more: Any) -> dict[str, Any]:
    """A batch that holds a tensor, used in float32, and in float64 for the hypergradient."""
    return {
        "module": layer,
        "x": lambda: make(grid(5, 3)),
        "fit": lambda model, s, batch: fit(model, s, (get(batch),)),
        "judge": lambda model, batch: judge(model, (get(batch).cos(),)),
        **IN_DOUBLE,
        **more,
    }


class Packing(nn.Module):
    """A recurrent layer on packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(3, 4)

    def forward(self, x: PackedSequence, gain: Tensor) -> Tensor:
        return pad_packed_sequence(self.layer(x)[0])[0] * gain


def packed(x: Tensor) -> PackedSequence:
    return pack_padded_sequence(x[:, None].repeat(1, 2, 1), torch.tensor([5, 3]))


BATCHES = {
    "tensor": holding(lambda x: x, lambda batch: batch),
    "tuple": holding(lambda x: (x, 1), lambda batch: batch[0]),
    "list": holding(lambda x: [x, x], lambda batch: batch[0]),
    "dict": holding(lambda x: {"x": x}, lambda batch: batch["x"]),
    "nested dicts and lists": holding(lambda x: {"a": [(x, None)]}, lambda batch: batch["a"][0][0]),
    "OrderedDict": holding(lambda x: OrderedDict(x=x), lambda batch: batch["x"]),
    "UserDict": holding(lambda x: UserDict(x=x), lambda batch: batch["x"]),
    "deque": holding(lambda x: deque([x]), lambda batch: batch[0]),
    "NamedTuple": holding(lambda x: Named(x, "a"), lambda batch: batch.x),
    "dataclass": holding(Data, lambda batch: batch.x),
    "frozen dataclass": holding(Frozen, lambda batch: batch.x),
    "SimpleNamespace": holding(lambda x: SimpleNamespace(x=x), lambda batch: batch.x),
    "an object of a class of your own": holding(Holder, lambda batch: batch.x),
    "strings and numbers beside tensors": holding(lambda x: {"x": x, "name": "a", "n": 3}, lambda batch: batch["x"]),
    "NumPy arrays": holding(
        lambda x: (x.numpy(),), lambda batch: torch.as_tensor(batch[0]).to(torch.get_default_dtype()), cast=None
    ),
    "PackedSequence": {
        "module": Packing,
        "x": lambda: (packed(grid(5, 3)),),
        "fit": lambda model, s, batch: (s[0] * model(batch[0], s[1]) - 0.3).square().mean(),
        "judge": lambda model, batch: model(batch[0], 1.0).cos().mean(),
        **IN_DOUBLE,
    },
    "sparse COO tensor": holding(lambda x: x.to_sparse(), lambda batch: batch.to_dense()),
    "sparse COO tensor, multiplied": holding(
        lambda x: x.to_sparse(), lambda batch: batch @ torch.ones(3, 3, dtype=batch.dtype)
    ),
    "sparse CSR tensor": holding(lambda x: x.to_sparse_csr(), lambda batch: batch.to_dense()),
    "nested tensor": holding(
        lambda x: torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged), lambda batch: batch.values()
    ),
    "DataLoader": holding(lambda x: x, lambda x: x, options={"data": DataLoader([grid(5, 3)], batch_size=None)}),
    "generator function": holding(lambda x: x, lambda x: x, options={"data": lambda: iter([grid(5, 3)])}),
    "dictionary of sources": holding(
        lambda x: {"a": x, "b": 1}, lambda batch: batch["a"], options={"data": {"a": [grid(5, 3)], "b": [1]}}
    ),
    "iterator": holding(lambda x: x, lambda x: x, options={"data": iter([grid(5, 3)])}),
    "tuple of tensors instead of batches": holding(
        lambda x: x, lambda x: x, options={"data": (grid(5, 3), grid(5, 3))}
    ),
    "accumulate": holding(lambda x: x, lambda x: x, options={"accumulate": 2}),
}


def number(dtype: torch.dtype, tolerance: float, **more: Any) -> dict[str, Any]:
    word = "exact" if tolerance < 1e-5 else "up to rounding"
    return {"module": layer, "x": lambda: (grid(5, 3),), "dtype": dtype, "tolerance": tolerance, "word": word} | more


class Mixed(nn.Module):
    """A layer in float32 and a head in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4).float(), nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.to(self.body.weight.dtype)).tanh().to(self.head.weight.dtype))


def complex_layer(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "module": lambda: nn.Sequential(nn.Linear(3, 4, dtype=dtype), nn.Tanh()),
        "x": lambda: (torch.complex(grid(5, 3), grid(5, 3).cos()).to(dtype),),
    }


PRECISIONS = {
    "float64": number(torch.float64, 1e-6),
    "float32": number(torch.float32, 1e-4),
    "float32, hypergradient in float64": number(torch.float32, 1e-5, cast=torch.float64) | {"word": "exact"},
    "bfloat16 autocast": number(torch.float32, 0.1, options={"autocast": torch.bfloat16}),
    "float16 autocast": number(torch.float32, 0.02, options={"autocast": torch.float16}),
    "bfloat16 parameters": number(torch.bfloat16, 0.2),
    "float16 parameters": number(torch.float16, 0.02),
    "float32 and float64 parameters": number(torch.float32, 1e-4, module=Mixed),
    "complex128 parameters": complex_layer(torch.complex128),
    "complex128 parameters, momentum": complex_layer(torch.complex128)
    | {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)},
    "complex128 parameters, Adam": complex_layer(torch.complex128)
    | {"optimizer": lambda p: Adam(p, lr=0.1), "warm": 3},
}


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
        "lazy layers, called before": called(lazy),
        "lazy layers, not called yet": lazy,
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
        "torch.compile, backend eager": lambda: compiled("eager"),
        "torch.compile, backend aot_eager": lambda: compiled("aot_eager"),
    }.items()
}

CASES: list[Case] = [
    *cases("Batches", BATCHES),
    *cases("Precisions", PRECISIONS),
    *cases("Modules and losses", MODULES),
    *cases("Scripted, traced and compiled modules", TRACED),
]
