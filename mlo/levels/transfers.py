"""Copies of batches to a GPU, which neither wait for it nor keep it waiting."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from mlo.levels.batch_trees import opened

Value = TypeVar("Value")


def to_device(value: Value, device: torch.device, owner: str | None = None) -> Value:
    """The tensors in ``value`` on the device. A copy to a GPU is made from pinned memory, so the host does not wait.

    Args:
        owner: the name of a problem whose batch it is: then tensors that cannot be reached are an error.
    """
    moved: Value = tree_map_only(Tensor, partial(_moved, device), opened(value, owner))
    return moved


def _moved(device: torch.device, tensor: Tensor) -> Tensor:
    dense = tensor.layout == torch.strided and not tensor.requires_grad
    if device.type == "cuda" and _on_host(tensor) and dense:
        tensor = tensor.pin_memory()  # no copy if it is pinned
    return tensor.to(device, non_blocking=device.type != "cpu")


class Arriving:
    """A batch on its way to a device.

    Args:
        batch: any nesting of tensors.
        device: where it goes.
        owner: the name of the problem.
        stream: if given, a stream of this GPU: tensors are copied there from the host while the GPU computes.
    """

    def __init__(self, batch: Any, device: torch.device, owner: str, stream: torch.cuda.Stream | None = None) -> None:
        self.device, self.batch = device, batch
        self.copied: torch.cuda.Event | None = None
        if device.type == "cpu":
            return
        parts, form = tree_flatten(opened(batch, owner))
        if stream is not None:
            with torch.cuda.stream(stream):
                parts = [_moved(device, part) if _on_host(part) else part for part in parts]
            self.copied = stream.record_event()
        self._parts = [_moved(device, part) if isinstance(part, Tensor) else part for part in parts]
        self.batch = tree_unflatten(self._parts, form)

    def get(self) -> Any:
        """The batch. What the GPU computes after this call waits for the copy; the host does not."""
        if self.copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(self.copied)
            for part in self._parts:
                if isinstance(part, Tensor):
                    part.record_stream(current)
            self.copied = None
        return self.batch


def from_host(batch: Any, device: torch.device) -> bool:
    """Whether tensors of the batch must be copied from the host to a GPU."""
    return device.type == "cuda" and any(map(_on_host, tree_leaves(opened(batch))))


def _on_host(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu"
