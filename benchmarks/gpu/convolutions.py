"""Section `convolutions`: those of the supernet, in both memory orders, beside the time that their bytes take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.device import copy_bandwidth
from benchmarks.gpu.session import Session
from benchmarks.gpu.timing import kernel_seconds, set_precision

EDGES = 5  # that leave an input of a cell
NEEDED = 3.0  # seconds, to begin another row with
ORDERS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


class Convolution(NamedTuple):
    """A kind of convolution of C channels to C channels, on all edges that leave one state.

    Attributes:
        name: as in the table.
        kernel, dilation: of the weight.
        groups: their number, from the number of channels.
    """

    name: str
    kernel: int
    dilation: int
    groups: Callable[[int], int]


KINDS = (
    Convolution("depthwise 3x3", 3, 1, lambda channels: channels),
    Convolution("depthwise 5x5", 5, 1, lambda channels: channels),
    Convolution("depthwise 3x3, dilated", 3, 2, lambda channels: channels),
    Convolution("depthwise 5x5, dilated", 5, 2, lambda channels: channels),
    Convolution("pointwise, a group for each edge", 1, 1, lambda channels: EDGES),
    Convolution("pointwise, dense", 1, 1, lambda channels: 1),
)


def measure(session: Session) -> None:
    """A row for each kind, size, dtype, memory order and precision."""
    bandwidth = copy_bandwidth(session)
    session.note("copy_tb_s", bandwidth)
    rows: list[dict[str, Any]] = []
    for kind, channels, side, dtype, order, tf32 in _cases(session):
        if not session.has_time("rest", 0.0 if session.smoke else NEEDED):
            break
        row: dict[str, Any] = {"convolution": kind.name, "channels": channels, "side": side, "dtype": str(dtype)[6:]}
        row |= {"order": order, "tf32": tf32}
        set_precision(tf32, benchmark=session.device.type == "cuda")
        try:
            row |= _microseconds(session, kind, channels, side, dtype, ORDERS[order], bandwidth)
        except RuntimeError as error:
            row["failed"] = str(error)[:200]
        rows.append(row)
        session.results["table"] = rows
    session.note("rows", len(rows))


def _cases(session: Session) -> Iterator[tuple[Convolution, int, int, torch.dtype, str, bool]]:
    """The shapes at the three resolutions of the supernet, the largest first."""
    size = session.size
    stages = [(EDGES * size.channels * 2**stage, size.image // 2**stage) for stage in range(1 if session.smoke else 3)]
    for channels, side in stages:
        for kind in KINDS:
            for dtype in (torch.float32, torch.bfloat16):
                for order in ORDERS:
                    depthwise = kind.groups(channels) == channels
                    for tf32 in (False, True) if dtype == torch.float32 and not depthwise else (False,):
                        yield kind, channels, side, dtype, order, tf32


def _microseconds(
    session: Session,
    kind: Convolution,
    channels: int,
    side: int,
    dtype: torch.dtype,
    order: torch.memory_format,
    bandwidth: float,
) -> dict[str, float]:
    """Forward, both gradients, the double backward, and the time of the forward's bytes at the device's bandwidth."""
    device, groups, padding = session.device, kind.groups(channels), kind.dilation * (kind.kernel // 2)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).to(memory_format=order)

    image = random(session.size.batch, channels, side, side)
    weight = random(channels, channels // groups, kind.kernel, kind.kernel)
    cotangent, second_image, second_weight = (torch.randn_like(each) for each in (image, image, weight))
    form = ([1, 1], [padding] * 2, [kind.dilation] * 2, False, [0, 0], groups)
    backward, twice = torch.ops.aten.convolution_backward, torch.ops.aten._convolution_double_backward

    def gradient(*wanted: bool) -> Callable[[], object]:
        return lambda: backward(cotangent, image, weight, None, *form, [*wanted, False])

    calls: dict[str, Callable[[], object]] = {
        "forward_us": lambda: F.conv2d(image, weight, None, 1, padding, kind.dilation, groups),
        "image_gradient_us": gradient(True, False),
        "weight_gradient_us": gradient(False, True),
        "double_backward_us": lambda: twice(
            second_image, second_weight, None, cotangent, weight, image, *form, [True, True, True]
        ),
    }
    with torch.no_grad():
        found = {name: round(1e6 * kernel_seconds(call, device), 1) for name, call in calls.items()}
    moved = image.nbytes + cotangent.nbytes + weight.nbytes
    return {**found, "bytes_us": round(moved / bandwidth / 1e6, 1)}
