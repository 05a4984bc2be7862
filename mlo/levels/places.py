"""The tensors of a module by position, and the module run with others in their places."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import islice, repeat
from operator import getitem, is_not
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mlo.levels.buffer_checks import Unfilled, gone, refuse_filled, refuse_reshaped
from mlo.ops.activation_checkpointing import RUNNING


class Places:
    """Where the tensors of a problem's module are kept: its variables, then its other parameters, then its buffers.

    Attributes:
        problem: the name of the problem.
        names: of all of them, as named_parameters and named_buffers list them.
        parameters: how many of them are parameters.
    """

    def __init__(self, problem: str, module: nn.Module, variables: Mapping[str, Tensor]) -> None:
        self.problem, self._module, self._unfilled = problem, module, Unfilled(module)
        self._call = _uncompiled(problem, module) if _is_compiled(module) else module
        found: dict[tuple[int, str], tuple[str, dict[str, Any], str, int]] = {}
        named = [(name, "_parameters") for name, _ in module.named_parameters(remove_duplicate=False)]
        named += [(name, "_buffers") for name, _ in module.named_buffers(remove_duplicate=False)]
        for name, kind in named:
            path, _, key = name.rpartition(".")
            owner = getattr(module.get_submodule(path), kind)  # one of a shared submodule is listed once
            rank = 2 if kind == "_buffers" else name not in variables
            found.setdefault((id(owner), key), (name, owner, key, int(rank)))
        first = {id(owner[key]): name for name, owner, key, _ in reversed(found.values())}
        listed = [place for place in found.values() if first[id(place[1][place[2]])] == place[0]]
        listed.sort(key=lambda place: place[3])
        self.names = tuple([name for name, *_ in listed])
        self.parameters = sum(rank < 2 for *_, rank in listed)
        self._holders, self._keys = [holder for _, holder, _, _ in listed], [key for _, _, key, _ in listed]
        numbers = {name: number for number, name in enumerate(self.names)}
        #: further names of tied tensors: (name, holder, key, number of the tensor)
        self._ties = [
            (name, holder, key, numbers[first[id(holder[key])]])
            for name, holder, key, _ in found.values()
            if first[id(holder[key])] != name
        ]
        order = {name: rank for rank, (name, *_) in enumerate(found.values())}
        self._in_order = sorted(range(self.parameters), key=lambda number: order[self.names[number]])
        self._ordered = self._in_order == list(range(self.parameters))

    def held(self) -> tuple[Tensor, ...]:
        """The module's own tensors.

        Raises:
            GraphError: if one of them is gone, or if forward has filled a buffer that held no tensor.
        """
        try:
            found = tuple(map(getitem, self._holders, self._keys))
        except KeyError:
            found = tuple([holder.get(key) for holder, key in zip(self._holders, self._keys, strict=True)])
        ties = [holder.get(key) for _, holder, key, _ in self._ties] if self._ties else ()
        if not all(map(is_not, (*found, *ties), repeat(None))):
            names = (*self.names, *[name for name, *_ in self._ties])
            raise gone(self.problem, next(n for n, t in zip(names, (*found, *ties), strict=True) if t is None))
        unfilled = self._unfilled
        if unfilled.empty or sum(map(len, unfilled.dictionaries)) != unfilled.count:  # most modules need no more
            filled = unfilled.filled()
            if filled:
                refuse_filled(self.problem, filled)
        return found

    def run(self, tensors: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output with ``tensors`` (variables, constants, buffers) instead of its own.

        With fewer tensors, they are the last ones, and the others stay. Tied tensors stay tied. If forward assigns a
        new tensor to a buffer, ``tensors`` contains it afterwards.
        """
        if torch.compiler.is_compiling():  # compiled checkpointing recomputes with the substituted tensors anyway
            every = self.named(tensors)
            # all names of tied tensors are given, so functional_call need not search for ties, which is slow
            if not every:
                return self._module(*args, **kwargs)
            output = functional_call(self._module, every, args, kwargs, tie_weights=False)
            tensors[:] = [every[name] for name in self.names[len(self.names) - len(tensors) :]]
            return output
        # as functional_call, in a third of its time, because the owners of all tensors are already known
        begin = len(self.names) - len(tensors)
        own = self._exchange(begin, tensors) if tensors else None
        RUNNING.append((self._module, self, tensors))
        try:
            output = self._call(*args, **kwargs)
        finally:
            RUNNING.pop()
            if own is not None:
                tensors[:] = self._exchange(begin, own)
            unfilled, filled = self._unfilled, list[str]()
            if unfilled.empty or sum(map(len, unfilled.dictionaries)) != unfilled.count:
                filled = unfilled.filled(remove=True)
        if filled:
            refuse_filled(self.problem, filled)
        return output

    def new_buffers(self, before: Sequence[Tensor], after: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """The buffers after a call, without their graphs.

        Raises:
            GraphError: if forward set one of them to None, or to a tensor of a different shape.
        """
        for name, one, other in zip(self.names[self.parameters :], before, after, strict=True):
            refuse_reshaped(self.problem, name, one, other)
        return tuple([tensor.detach() for tensor in after if tensor is not None])

    def _exchange(self, begin: int, tensors: Sequence[Any]) -> list[Any]:
        """Put ``tensors`` into the module, from the number ``begin`` on; what was there before."""
        before = []
        places = zip(islice(self._holders, begin, None), islice(self._keys, begin, None), tensors, strict=True)
        for holder, key, tensor in places:
            before.append(holder.get(key))
            holder[key] = tensor
        for _, holder, key, number in self._ties:
            if number >= begin:
                holder[key] = tensors[number - begin]
        return before

    def named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The last tensors under all their names."""
        begin = len(self.names) - len(tensors)
        found = dict(zip(self.names[begin:], tensors, strict=True))
        return found | {name: tensors[number - begin] for name, _, _, number in self._ties if number >= begin}

    def named_parameters(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """{name: parameter}, in the order of the module."""
        if self._ordered:
            return dict(zip(self.names, tensors, strict=False))
        return {self.names[number]: tensors[number] for number in self._in_order}


def _is_compiled(module: nn.Module) -> bool:
    """Whether the user has compiled the module, or a part of it."""
    return any([part._compiled_call_impl is not None or "_orig_mod" in part._modules for part in module.modules()])


def _uncompiled(problem: str, module: nn.Module) -> Callable[..., Any]:
    """What runs a compiled module as it is written, since its compiled gradients cannot be differentiated."""
    warnings.warn(
        f"problem {problem!r}: its module is compiled by torch.compile, whose gradients cannot be differentiated, so "
        "it runs uncompiled; pass the module as it is, and Engine(compile=True), which compiles whole gradients",
        stacklevel=4,
    )

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.compiler.set_stance("force_eager"):
            return module(*args, **kwargs)

    return call
