"""Copies of batches to a GPU, which neither wait for it nor keep it waiting."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

Value = TypeVar("Value")


def to_device(value: Value, device: torch.device) -> Value:
    """The tensors in ``value`` on the device. A copy to a GPU is made from pinned memory, so the host does not wait."""

    def move(tensor: Tensor) -> Tensor:
        dense = tensor.layout == torch.strided and not tensor.requires_grad
        if device.type == "cuda" and _on_host(tensor) and dense:
            tensor = tensor.pin_memory()  # no copy if it is pinned
        return tensor.to(device, non_blocking=device.type != "cpu")

    moved: Value = tree_map_only(Tensor, move, value)
    return moved


class Arriving:
    """A batch on its way to a device.

    Args:
        batch: any nesting of tensors.
        device: where it goes.
        stream: if given, a stream of this GPU: tensors are copied there from the host while the GPU computes.
    """

    def __init__(self, batch: Any, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self.device = device
        self.copied: torch.cuda.Event | None = None
        if stream is not None:
            with torch.cuda.stream(stream):
                batch = tree_map_only(Tensor, lambda t: to_device(t, device) if _on_host(t) else t, batch)
            self.copied = stream.record_event()
        self.batch = batch if device.type == "cpu" else to_device(batch, device)

    def get(self) -> Any:
        """The batch. What the GPU computes after this call waits for the copy; the host does not."""
        if self.copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(self.copied)
            tree_map_only(Tensor, lambda tensor: tensor.record_stream(current), self.batch)
            self.copied = None
        return self.batch


def from_host(batch: Any, device: torch.device) -> bool:
    """Whether tensors of the batch must be copied from the host to a GPU."""
    return device.type == "cuda" and any(map(_on_host, tree_leaves(batch)))


def _on_host(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu"
