"""CUDA graphs on the CPU: operations are recorded with their tensors, and replayed into the same memory.

As with a CUDA graph, numbers that are not in tensors are those of the recording, a value read on the host is an error,
and recording changes no tensor. Random numbers are those of :class:`Generator`, which behaves as that of a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

import mlo
from mlo.ops import rng, torch_versions

READS = frozenset(("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"))
RECORDING: list[Recorder] = []  # at most one


class Generator:
    """Behaves as the default generator of a GPU: its state is a seed and an offset.

    In a recording, the offset counts from the beginning of the graph, and the seed cannot change. A replay moves the
    generator on as far as the recording did. If that is not at all, torch does not tell the graph its state.
    """

    def __init__(self) -> None:
        self.seed = self.offset = 0

    def get_state(self) -> Tensor:
        return torch.tensor([self.seed, RECORDING[0].offset if RECORDING else self.offset])

    def set_state(self, state: Tensor) -> None:
        seed, offset = state.tolist()
        if RECORDING:
            assert seed == self.seed
            RECORDING[0].offset = offset
        else:
            self.seed, self.offset = seed, offset

    def moved_on(self) -> int:
        """Where a random operation draws."""
        if RECORDING:
            RECORDING[0].offset += 4
            return RECORDING[0].offset - 4
        self.offset += 4
        return self.offset - 4


def emulated_state(device: torch.device) -> Tensor | None:
    """As :func:`mlo.ops.rng.gpu_state`, for a device other than the constant for the CPU."""
    if device is rng.CPU or (RECORDING and not torch_versions.RECORDS_DRAWS):
        return None
    return Drawing.default.get_state()


class Drawing(TorchDispatchMode):
    """A context in which random operations draw from a :class:`Generator`, and not from that of the CPU."""

    ignore_compile_internals = classmethod(lambda cls: True)

    #: the default generator; during a replay, where to draw next; whether data are read, which is done on the CPU
    default, replayed, reading = Generator(), None, False

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if Drawing.reading or torch.Tag.nondeterministic_seeded not in operator.tags:
            return operator(*args, **(kwargs or {}))
        if Drawing.replayed is not None:
            seed, offset = Drawing.replayed
        elif RECORDING:  # computes nothing that is seen
            seed = offset = 0
        else:
            seed, offset = Drawing.default.seed, Drawing.default.moved_on()
        return drawn(operator, args, kwargs or {}, seed, offset)


def drawn(operator: Any, args: Any, kwargs: Any, seed: int, offset: int) -> Any:
    """The result of a random operation. The generator of the CPU, which it uses, is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1_000_003 * seed + offset)
        return operator(*args, **kwargs)


@contextmanager
def reading() -> Iterator[None]:
    """A context in which data are read."""
    Drawing.reading = True
    try:
        yield
    finally:
        Drawing.reading = False


class Recorder(TorchDispatchMode):
    """A context in which operations are recorded. Afterwards all tensors are as before."""

    ignore_compile_internals = classmethod(lambda cls: True)

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor], int | None]] = []
        self.offset = 0  # of the generator, from the beginning on
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # memory that is written into, and its values before
        self.own: set[int] = set()  # memory of the recording

    def __enter__(self) -> Recorder:
        RECORDING.append(self)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        RECORDING.clear()
        for tensor, values in self.before.values():
            tensor.untyped_storage().copy_(values.untyped_storage())

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator.overloadpacket.__name__ in READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.keep(operator, args, kwargs)
        draw = None
        if torch.Tag.nondeterministic_seeded in operator.tags:
            draw = Drawing.default.moved_on()
            result = drawn(operator, args, kwargs, 0, 0)
        else:
            result = operator(*args, **kwargs)
        made = made_by(result, args, kwargs)
        self.own |= set(map(memory, made))
        self.calls.append((operator, args, kwargs, made, draw))
        return result

    def keep(self, operator: Any, args: Any, kwargs: Any) -> None:
        """Keep the values of tensors from before the recording that the operator writes into."""
        named = operator._schema.arguments
        given = dict(zip([argument.name for argument in named], args, strict=False)) | kwargs
        written = [a.name for a in named if a.alias_info is not None and a.alias_info.is_write]
        for tensor in tensors_in([given.get(name) for name in written]):
            if memory(tensor) not in self.own and memory(tensor) not in self.before:
                copy = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).clone()
                self.before[memory(tensor)] = tensor, copy

    @torch.no_grad()
    def replay(self) -> None:
        """Run the operations; what they made is overwritten with what they make now."""
        seed, begin = (Drawing.default.seed, Drawing.default.offset) if self.offset else (-1, -1)
        for operator, args, kwargs, made, draw in self.calls:
            if draw is None:
                result = operator(*args, **kwargs)
            else:
                Drawing.replayed = seed, begin + draw
                result = drawn(operator, args, kwargs, *Drawing.replayed)
            for old, new in zip(made, made_by(result, args, kwargs), strict=True):
                old.copy_(new)
        Drawing.replayed = None
        Drawing.default.offset += self.offset


def memory(tensor: Tensor) -> int:
    """Where the tensor's memory is."""
    return tensor.untyped_storage().data_ptr()


def made_by(result: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors in the result that are in none of the arguments' memory."""
    given = set(map(memory, tensors_in((args, kwargs))))
    return [tensor for tensor in tensors_in(result) if memory(tensor) not in given]


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors that have memory of their own: zeros of forward mode have none, and sparse ones that of others."""
    found = [leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]
    return [tensor for tensor in found if tensor.layout is torch.strided and not tensor._is_zerotensor()]


def record(function: Callable[[], None]) -> Callable[[], None]:
    """As :func:`mlo.training.captured.cuda_graph`."""
    with Recorder() as recorder:
        function()
    return recorder.replay


def assert_same(plain: mlo.Engine, captured: mlo.Engine, rtol: float = 1e-11) -> None:
    """All that a run consists of."""
    one, other = (tree_map(_comparable, engine.state_dict()) for engine in (plain, captured))
    torch.testing.assert_close(other, one, rtol=rtol, atol=rtol / 100)
    assert plain.passes == captured.passes
    assert plain.pullbacks == captured.pullbacks
    assert plain.rounds == captured.rounds


def _comparable(leaf: Any) -> Any:
    return 0 if isinstance(leaf, str) else leaf  # torch.testing compares no strings, such as a generator's kind
