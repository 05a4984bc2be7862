"""State trees as JSON and bytes: what a checkpoint can hold, and how each kind of value is written.

A value that JSON has is written as it is: null, booleans, text, integers of 64 bits, and finite floats. All others are
lists that begin with their kind, such as ["tuple", 1, 2]. A tensor's list says where in which storage it is, so that
tensors that share a storage still do when they are read. Nothing in it names code.
"""

from __future__ import annotations

import math
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlo.errors import CheckpointError

ALIGNMENT = 16  # of the first byte that is kept of a storage; at least the largest element
DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
ARRAYS = re.compile(r"[<>|=][biufcSUMm]\d+(\[\w+\])?")  # NumPy's types that hold values, not objects
SEQUENCES: dict[type, str] = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset", torch.Size: "size"}
MAPPINGS: dict[type, str] = {dict: "dict", OrderedDict: "ordered", Counter: "counter"}
METADATA = "_metadata"  # what torch puts on the state of a module: the version of each of its classes


class Writer:
    """Writes values as JSON, and collects the storages of their tensors.

    Attributes:
        storages: the bytes of each, once :meth:`finish` was called; they share memory with tensors on the CPU.
    """

    def __init__(self) -> None:
        self.storages: list[Tensor] = []
        self._held: dict[tuple[Any, ...], _Storage] = {}

    def value(self, value: Any, where: str = "the state") -> Any:
        """A value as JSON; ``where`` it is, for messages.

        Raises:
            CheckpointError: if a checkpoint cannot hold it.
        """
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is int:
            return value if -(2**63) <= value < 2**63 else ["int", hex(value)]
        if kind is float:
            return value if math.isfinite(value) else ["float", repr(value)]
        if kind in SEQUENCES:
            return [SEQUENCES[kind], *[self.value(item, f"{where}[{i}]") for i, item in enumerate(value)]]
        if kind in MAPPINGS:
            return self._mapping(kind, value, where)
        if kind in (Tensor, nn.Parameter):
            return self._tensor(value, where)
        return self._rare(value, where)

    def finish(self) -> None:
        """Lay out the storages, after all values were written."""
        for number, held in enumerate(self._held.values()):
            self.storages.append(held.bytes())
            for node, first, size in held.nodes:
                node[4:6] = number, (first - held.first) // size

    def _mapping(self, kind: type, value: Mapping[Any, Any], where: str) -> list[Any]:
        found: list[Any] = [MAPPINGS[kind]]
        if kind is OrderedDict:
            found.append(self.value(getattr(value, METADATA, None), where))
        for key, item in value.items():
            found += [self.value(key, f"a key of {where}"), self.value(item, f"{where}[{key!r}]")]
        return found

    def _rare(self, value: Any, where: str) -> list[Any]:
        if type(value) is complex:
            return ["complex", self.value(value.real), self.value(value.imag)]
        if type(value) is bytes:
            return ["bytes", value.hex()]
        if isinstance(value, torch.dtype | torch.device):
            return [type(value).__name__, str(value).removeprefix("torch.")]
        if isinstance(value, np.generic) and ARRAYS.fullmatch(value.dtype.str):
            return ["scalar", value.dtype.str, value.tobytes().hex()]
        if type(value) is np.ndarray and ARRAYS.fullmatch(value.dtype.str):
            raw = torch.from_numpy(np.frombuffer(bytearray(value.tobytes()), np.uint8))
            return ["array", value.dtype.str, list(value.shape), self._tensor(raw, where)]
        raise CheckpointError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold; keep "
            "tensors, numbers, text, and lists and dictionaries of these there"
        )

    def _tensor(self, tensor: Tensor, where: str) -> list[Any]:
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
            what = "quantized" if tensor.is_quantized else f"{tensor.layout} on {tensor.device}"
            raise CheckpointError(f"{where} is a tensor ({what}) that a checkpoint cannot hold; keep a dense one there")
        own = [isinstance(tensor, nn.Parameter), tensor.requires_grad]
        tensor = tensor.detach().resolve_conj().resolve_neg()
        if tensor.numel() * tensor.element_size() > _end(tensor) - _first(tensor):  # elements share memory
            tensor = tensor.contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        node = ["tensor", dtype, list(tensor.shape), list(tensor.stride()), None, 0, *own]
        if tensor.numel():
            key = tensor.device, tensor.untyped_storage().data_ptr()
            self._held.setdefault(key, _Storage(tensor)).add(tensor, node)
        return node


class _Storage:
    """The part of a storage that tensors of a state use."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor  # holds the storage
        self.first, self._end = _first(tensor), 0
        self.nodes: list[tuple[list[Any], int, int]] = []

    def add(self, tensor: Tensor, node: list[Any]) -> None:
        self.first = min(self.first, _first(tensor) // ALIGNMENT * ALIGNMENT)
        self._end = max(self._end, _end(tensor))
        self.nodes.append((node, _first(tensor), tensor.element_size()))

    def bytes(self) -> Tensor:
        raw = torch.empty(0, dtype=torch.uint8, device=self._tensor.device)
        return raw.set_(self._tensor.untyped_storage(), self.first, (self._end - self.first,), (1,))


def _first(tensor: Tensor) -> int:
    """The first byte of its storage that the tensor uses."""
    return int(tensor.storage_offset()) * tensor.element_size()


def _end(tensor: Tensor) -> int:
    """The byte of its storage after the last one that the tensor uses."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    used = 1 + sum([(size - 1) * stride for size, stride in steps]) if tensor.numel() else 0
    return _first(tensor) + used * tensor.element_size()


class Reader:
    """Reads values from JSON and storages; what does not have the form that :class:`Writer` gives is a ValueError."""

    def __init__(self, storages: Sequence[Tensor]) -> None:
        self._storages = storages
        self._kinds: dict[str, Callable[..., Any]] = {
            "int": lambda text: int(text, 16),
            "float": float,
            "complex": lambda real, imag: complex(self.value(real), self.value(imag)),
            "bytes": bytes.fromhex,
            "dtype": DTYPES.__getitem__,
            "device": torch.device,
            "scalar": lambda dtype, text: np.ndarray((), _array_dtype(dtype), bytes.fromhex(text))[()],
            "array": self._array,
            "tensor": self._tensor,
            "ordered": self._ordered,
        }
        for kind, name in SEQUENCES.items():
            self._kinds[name] = lambda *items, kind=kind: kind([self.value(item) for item in items])
        for kind in (dict, Counter):
            self._kinds[MAPPINGS[kind]] = lambda *items, kind=kind: kind(self._pairs(items))

    def value(self, node: Any) -> Any:
        """The value that was written."""
        if not isinstance(node, list):
            if isinstance(node, dict):
                raise ValueError("an object")
            return node
        return self._kinds[node[0]](*node[1:])

    def _pairs(self, items: Sequence[Any]) -> dict[Any, Any]:
        return {self.value(k): self.value(v) for k, v in zip(items[::2], items[1::2], strict=True)}

    def _ordered(self, metadata: Any, *items: Any) -> OrderedDict[Any, Any]:
        found = OrderedDict(self._pairs(items))
        if metadata is not None:
            setattr(found, METADATA, self.value(metadata))
        return found

    def _array(self, dtype: str, shape: list[int], raw: list[Any]) -> np.ndarray:
        tensor = self._tensor(*raw[1:])
        return np.ndarray([_count(size) for size in shape], _array_dtype(dtype), tensor.numpy())

    def _tensor(
        self,
        dtype: str,
        shape: list[int],
        stride: list[int],
        storage: int | None,
        offset: int,
        parameter: bool,
        requires_grad: bool,
    ) -> Tensor:
        sizes, strides = [_count(size) for size in shape], [_count(step) for step in stride]
        tensor = torch.empty(0, dtype=DTYPES[dtype])
        if storage is None:
            if math.prod(sizes):
                raise ValueError("a tensor without a storage")
            tensor = tensor.as_strided(sizes, strides)
        else:
            held = self._storages[_count(storage)].untyped_storage()
            last = sum([(size - 1) * step for size, step in zip(sizes, strides, strict=True)])
            fits = max(_count(offset) + last + 1, math.prod(sizes)) * tensor.element_size() <= held.nbytes()
            if not fits or 0 in sizes:
                raise ValueError("a tensor that is larger than its storage")
            tensor.set_(held, offset, sizes, strides)
        return nn.Parameter(tensor, requires_grad) if parameter else tensor.requires_grad_(requires_grad)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError(f"{value!r} where a size is expected")
    return value


def _array_dtype(text: str) -> np.dtype[Any]:
    if not ARRAYS.fullmatch(text):
        raise ValueError(f"an array of {text}")
    return np.dtype(text)
