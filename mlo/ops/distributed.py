"""Several processes that train together, as torchrun starts them: who this one is, and what all of them agree on.

No other module knows torch.distributed. In one process nothing here copies, sends or waits, and nothing imports torch,
so that the command line starts without it. In several, all call these functions in the same order.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from mlo.errors import ConfigError, MloError, ProcessError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Value = TypeVar("Value")
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
FOREVER = timedelta(days=365)  # the first process may test or write for long; torchrun ends the others of a dead one
_store: list[Any] = []  # of the process group


def world() -> int:
    """How many processes train together; 1 without a process group."""
    if "torch.distributed" not in sys.modules:  # then nothing can have started a process group
        return 1
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    if world() == 1:
        return 0
    import torch.distributed as dist

    return dist.get_rank()


def is_main() -> bool:
    """Whether this is the first process, which alone writes and prints."""
    return rank() == 0


def launcher() -> str:
    """What a command of mlo begins with, to be run as this one was."""
    each = os.environ.get("LOCAL_WORLD_SIZE", str(world()))
    return "mlo" if world() == 1 else f"torchrun --nproc-per-node {each} -m mlo"


@contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started, and leave them at the end; nothing where it started one or none."""
    if any(name not in os.environ for name in ENVIRONMENT) or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    store, number, count = next(rendezvous("env://"))
    cards = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if cards else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=FOREVER)
    _store[:] = [store]
    try:
        yield
    finally:
        _store.clear()
        dist.destroy_process_group()


def own_device(device: str | torch.device) -> torch.device:
    """``device``, with "cuda" as the card whose number this process has on its machine.

    Raises:
        ConfigError: if there are fewer cards than processes, or another card is named.
    """
    import torch

    device = torch.device(device)
    if world() == 1 or device.type != "cuda":
        return device
    number, cards = int(os.environ.get("LOCAL_RANK") or rank()), torch.cuda.device_count()
    if number >= cards:
        raise ConfigError(
            f"device: {number + 1} processes or more on this machine, but {cards} cards; "
            f"start one for each card (torchrun --nproc-per-node {cards}), or write device: cpu"
        )
    if device.index not in (None, number):
        raise ConfigError(f"device: {device} was given, but each of several processes has its own card; write auto")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def share(size: int, what: str = "a batch") -> slice:
    """This process's part of ``size`` things of which all processes together have one batch: every world-th.

    Raises:
        ConfigError: if the parts would not be of one size, for the mean of the processes' means would not be the mean.
    """
    if size % world():
        lower = size - size % world()
        raise ConfigError(
            f"{what} of {size} cannot be parted evenly among {world()} processes; "
            f"make it a multiple of {world()}, such as {lower or world()}"
        )
    return slice(rank(), None, world())


def average(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The means of tensors over all processes, the same to the bit in each; what is not finite in one is so in all."""
    if world() == 1:
        return list(tensors)
    import torch.distributed as dist

    def mean(flat: Tensor) -> None:
        dist.all_reduce(flat)
        flat.div_(world())

    return _as_one(tensors, mean)


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The first process's tensors, in all; those of the other processes say of what form they are."""
    if world() == 1:
        return list(tensors)
    import torch
    import torch.distributed as dist

    return _as_one(tensors, lambda flat: dist.broadcast(flat.view(torch.uint8), 0))


def follow_main(tensors: Sequence[Tensor]) -> None:
    """Set tensors, in all, to what the first process has."""
    if world() == 1:
        return
    import torch

    with torch.no_grad():
        for tensor, first in zip(tensors, copies(tensors), strict=True):
            tensor.copy_(first)


def any_of(flag: bool) -> bool:
    """Whether the flag is up in any of all processes."""
    if world() == 1:
        return flag
    import torch
    import torch.distributed as dist

    up = torch.tensor(int(flag))
    with _together():
        dist.all_reduce(up, dist.ReduceOp.MAX)
    return bool(up.item())


def gathered(value: Value) -> list[Value]:
    """The values of all processes, by their numbers; anything that can be pickled."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world()
    with _together():
        dist.all_gather_object(values, value)
    return values


def on_main(function: Callable[[], Value]) -> Value:
    """What ``function`` returns in the first process, which alone calls it, or raises there; in all processes."""
    if world() == 1:
        return function()
    import torch.distributed as dist

    found: list[Any] = [None, None]
    if is_main():
        try:
            found[0] = function()
        except BaseException as error:
            with _together():
                dist.broadcast_object_list([None, _portable(error)])
            raise
    with _together():
        dist.broadcast_object_list(found)
    value, failure = found
    if failure is not None:
        raise failure
    return value  # type: ignore[no-any-return]


@contextmanager
def main_first() -> Iterator[None]:
    """Let the first process go through the body before the others; for a download into a folder that all read."""
    if not is_main():
        any_of(False)
    try:
        yield
    finally:
        if is_main():
            any_of(False)


def tells(error: MloError) -> bool:
    """Whether this process is to tell the error that it ends with: the first, or one that has another of its own."""
    if not _store:
        return True
    if is_main():
        _store[0].set("error", str(error))
        return True
    if isinstance(error, ProcessError):
        return False
    try:
        _store[0].wait(["error"], timedelta(seconds=3))
        return bool(_store[0].get("error").decode() != str(error))
    except RuntimeError:  # the first process has met no error
        return True


def _as_one(tensors: Sequence[Tensor], act: Callable[[Tensor], object]) -> list[Tensor]:
    """``act`` on one vector of all tensors of a dtype, in place, and what comes of each."""
    import torch

    found = list(tensors)
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        places = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = torch.cat([tensors[place].detach().reshape(-1) for place in places])
        with _together():
            act(flat)
        parts = flat.split([tensors[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            found[place] = part.view(tensors[place].shape)
    return found


@contextmanager
def _together() -> Iterator[None]:
    """Around what needs the other processes."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ProcessError(
            f"another process of this training has ended, so this one cannot go on ({reason}); "
            "the message of that one says why"
        ) from error


def _portable(error: BaseException) -> BaseException:
    """The error, as far as it can be sent."""
    known = isinstance(error, MloError | KeyboardInterrupt | SystemExit)
    return error if known else ProcessError(f"the first process has failed: {type(error).__name__}: {error}")
