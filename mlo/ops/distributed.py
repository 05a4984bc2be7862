"""Distributed training with several processes, as started by torchrun: ranks, devices and collective operations.

No other module uses torch.distributed. In a single process nothing here copies, sends or waits, and nothing imports
torch, so that the command line starts without it. With several processes, all must call these functions in the same
order.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mlo.errors import ConfigError, MloError, ProcessError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Value = TypeVar("Value")
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
FOREVER = timedelta(days=365)  # the first process may evaluate for long; if one fails, torchrun ends the others
_store: list[Any] = []  # the store of the process group


def world() -> int:
    """Number of processes; 1 without a process group."""
    if "torch.distributed" not in sys.modules:  # then nothing can have started a process group
        return 1
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The rank of this process, from 0."""
    if world() == 1:
        return 0
    import torch.distributed as dist

    return dist.get_rank()


def is_main() -> bool:
    """Whether this is the first process, the only one that writes files and prints."""
    return rank() == 0


def launcher() -> str:
    """How a command of mlo starts in a shell if launched like this process: "mlo", or torchrun and its options."""
    if world() > 1:
        return f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', world())} -m mlo"
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return f"{_in_a_shell(Path(sys.executable))} -m mlo"
    return _in_a_shell(program) if program.stem == "mlo" and len(program.parts) > 1 else "mlo"


def _in_a_shell(program: Path) -> str:
    """The program's name where a shell finds this very program under it, else its path."""
    found, path = shutil.which(program.name), os.path.abspath(program)
    if found and os.path.abspath(found) == path:
        return program.name
    return shlex.quote(os.path.relpath(path) if path.startswith(os.getcwd() + os.sep) else path)


@contextmanager
def processes() -> Iterator[None]:
    """A context with the process group of the processes that torchrun started; does nothing for a single process."""
    if any(name not in os.environ for name in ENVIRONMENT) or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    store, number, count = next(rendezvous("env://"))
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=FOREVER)
    _store[:] = [store]
    try:
        yield
    finally:
        _store.clear()
        dist.destroy_process_group()


def own_device(device: str | torch.device) -> torch.device:
    """``device``, where "cuda" means the GPU with this process's local rank.

    Raises:
        ConfigError: if there are fewer GPUs than processes, or ``device`` is the GPU of another process.
    """
    import torch

    device = torch.device(device)
    if world() == 1 or device.type != "cuda":
        return device
    number, gpus = int(os.environ.get("LOCAL_RANK") or rank()), torch.cuda.device_count()
    if number >= gpus:
        raise ConfigError(
            f"device: at least {number + 1} processes on this machine, but {gpus} GPUs; "
            f"start one process per GPU (torchrun --nproc-per-node {gpus}), or write device: cpu"
        )
    if device.index not in (None, number):
        raise ConfigError(f"device: {device} was given, but each of several processes has its own GPU; write auto")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def share(size: int, what: str = "a batch") -> slice:
    """The slice of a batch of ``size`` items that belongs to this process.

    Args:
        size: the size of the batch of all processes together.
        what: what the size is of, for the message.

    Raises:
        ConfigError: if ``size`` is not a multiple of the number of processes. The parts would differ in size, and the
            mean of their means would not be the mean over the batch.
    """
    if size % world():
        lower = size - size % world()
        raise ConfigError(
            f"{what} of {size} cannot be divided evenly among {world()} processes; "
            f"make it a multiple of {world()}, such as {lower or world()}"
        )
    return slice(rank(), None, world())


def average(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The means of tensors over all processes, bit-identical in each. NaN or infinity in one process spreads to all."""
    if world() == 1:
        return list(tensors)
    import torch.distributed as dist

    def mean(flat: Tensor) -> None:
        dist.all_reduce(flat)
        flat.div_(world())

    return _as_one(tensors, mean)


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of the first process, in all processes; the others pass tensors of the same shapes and dtypes."""
    if world() == 1:
        return list(tensors)
    import torch
    import torch.distributed as dist

    return _as_one(tensors, lambda flat: dist.broadcast(flat.view(torch.uint8), 0))


def follow_main(tensors: Sequence[Tensor]) -> None:
    """Set tensors to the values of the first process, in all processes."""
    if world() == 1:
        return
    import torch

    with torch.no_grad():
        for tensor, first in zip(tensors, copies(tensors), strict=True):
            tensor.copy_(first)


def any_of(flag: bool) -> bool:
    """Whether ``flag`` is True in any process."""
    if world() == 1:
        return flag
    import torch
    import torch.distributed as dist

    raised = torch.tensor(int(flag))
    with _together():
        dist.all_reduce(raised, dist.ReduceOp.MAX)
    return bool(raised.item())


def gathered(value: Value) -> list[Value]:
    """The values of all processes, in the order of their ranks; they must be picklable."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world()
    with _together():
        dist.all_gather_object(values, value)
    return values


def on_main(function: Callable[[], Value]) -> Value:
    """Call ``function`` in the first process only; return its result, or raise its error, in all processes."""
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
    """A context that the first process runs before the others, such as a download into a folder that all read."""
    if not is_main():
        any_of(False)
    try:
        yield
    finally:
        if is_main():
            any_of(False)


def prints_error(error: MloError) -> bool:
    """Whether this process should print the error: it is the first one, or its error differs from the first one's."""
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
    except RuntimeError:  # the first process has no error
        return True


def _as_one(tensors: Sequence[Tensor], act: Callable[[Tensor], object]) -> list[Tensor]:
    """Apply ``act``, in place, to one flat tensor per dtype; return the parts in the shapes of ``tensors``."""
    import torch

    found = list(tensors)
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        indices = [index for index, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = torch.cat([tensors[index].detach().reshape(-1) for index in indices])
        with _together():
            act(flat)
        parts = flat.split([tensors[index].numel() for index in indices])
        for index, part in zip(indices, parts, strict=True):
            found[index] = part.view(tensors[index].shape)
    return found


@contextmanager
def _together() -> Iterator[None]:
    """A context for collective operations; raises a ProcessError if another process has ended."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ProcessError(
            f"another process of this run has ended, so this one cannot continue ({reason}); "
            "see the message of that process"
        ) from error


def _portable(error: BaseException) -> BaseException:
    """The error in a form that can be pickled and sent to other processes."""
    known = isinstance(error, MloError | KeyboardInterrupt | SystemExit)
    return error if known else ProcessError(f"the first process has failed: {type(error).__name__}: {error}")
