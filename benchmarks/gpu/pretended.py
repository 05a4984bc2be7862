"""Tensors without data that say they are on a GPU: code for a GPU runs on them anywhere, in no memory.

The tensors are on torch's meta device, so operations compute shapes and nothing else. Inside :func:`pretended_gpu`,
their ``device`` reads cuda:0, tensors made on "cuda" are of this kind, and the few functions of ``torch.cuda`` that a
training loop calls answer as on a machine with one GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

GPU, META = torch.device("cuda", 0), torch.device("meta")
DEVICE, IS_CUDA = Tensor.device.__get__, Tensor.is_cuda.__get__


class HostReadError(RuntimeError):
    """Something waits for the GPU: a value is read on the host, or a copy of it is not asynchronous."""


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """A context in which meta tensors pass for tensors on a GPU. It does not nest."""
    state = torch.zeros(16, dtype=torch.uint8)  # as a GPU's random state, which is on the host
    stream = mock.Mock(is_capturing=lambda: False, record_event=_Event)
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda device=None: state,
        "set_rng_state": lambda new, device=None: None,
        "current_stream": lambda device=None: stream,
        "Stream": lambda device=None: stream,
        "stream": nullcontext,
        "synchronize": _wait,
        "Event": _Event,
    }
    with (
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch.object(torch.accelerator, "current_stream", return_value=stream),
        mock.patch.object(Tensor, "record_stream"),
        _Pretence(),
    ):
        yield


class _Pretence(TorchFunctionMode):
    """Takes "cuda" for the meta device where tensors are made and moved, and says so where they are asked."""

    def __torch_function__(
        self, function: Callable[..., Any], _: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See :class:`torch.overrides.TorchFunctionMode`."""
        if function == DEVICE:
            device = function(*args)
            return GPU if device.type == "meta" else device
        if function == IS_CUDA:
            return args[0].is_meta
        options = dict(kwargs or {})
        if "device" in options:
            options["device"] = _real(options["device"])
        if options.get("pin_memory"):
            options["pin_memory"] = False
        if function is Tensor.pin_memory:
            return args[0]
        if function is Tensor.cuda:
            return args[0].to(META)
        if function is Tensor.to:
            args = tuple(map(_real, args))
        return function(*args, **options)


def _real(value: Any) -> Any:
    """The meta device for a GPU; anything else as it is."""
    if isinstance(value, torch.device) or (isinstance(value, str) and value.startswith("cuda")):
        return META if torch.device(value).type == "cuda" else value
    return value


class _Event:
    """An event of a stream that has not happened yet."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.record = self.wait = lambda stream=None: None

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        _wait()


def _wait(_: Any = None) -> None:
    raise HostReadError("the host waits for the GPU")
