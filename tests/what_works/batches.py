"""Batches of every type, and precisions."""

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
from torch.utils.data import DataLoader

from .case import Case, cases, fit, grid, judge

IN_DOUBLE = {"dtype": torch.float32, "cast": torch.float64, "tolerance": 1e-5}

IN_SINGLE = {"cast": None, "tolerance": 1e-4, "word": "up to rounding"}


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
    "an object of a class of your own (hypergradient in float32)": holding(Holder, lambda batch: batch.x, **IN_SINGLE),
    "an object of a class of your own": holding(Holder, lambda batch: batch.x),
    "strings and numbers beside tensors": holding(lambda x: {"x": x, "name": "a", "n": 3}, lambda batch: batch["x"]),
    "NumPy arrays": holding(
        lambda x: (x.numpy(),), lambda batch: torch.as_tensor(batch[0]).to(torch.get_default_dtype()), **IN_SINGLE
    ),
    "PackedSequence": {
        "module": Packing,
        "x": lambda: (packed(grid(5, 3)),),
        "fit": lambda model, s, batch: (s[0] * model(batch[0], s[1]) - 0.3).square().mean(),
        "judge": lambda model, batch: model(batch[0], 1.0).cos().mean(),
        **IN_DOUBLE,
    },
    "sparse COO tensor": holding(lambda x: x.to_sparse(), lambda batch: batch.to_dense()),
    "sparse COO tensor (multiplied)": holding(
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
    "float32 (hypergradient in float64)": number(torch.float32, 1e-5, cast=torch.float64) | {"word": "exact"},
    "bfloat16 autocast": number(torch.float32, 0.1, options={"autocast": torch.bfloat16}),
    "float16 autocast": number(torch.float32, 0.02, options={"autocast": torch.float16}),
    "bfloat16 parameters": number(torch.bfloat16, 0.2),
    "float16 parameters": number(torch.float16, 0.02),
    "float32 and float64 parameters": number(torch.float32, 1e-4, module=Mixed),
    "complex128 parameters": complex_layer(torch.complex128),
    "complex128 parameters (momentum)": complex_layer(torch.complex128)
    | {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)},
    "complex128 parameters (Adam)": complex_layer(torch.complex128)
    | {"optimizer": lambda p: Adam(p, lr=0.1), "warm": 3},
}


CASES: list[Case] = [
    *cases("Batches", BATCHES),
    *cases("Precisions", PRECISIONS),
]
