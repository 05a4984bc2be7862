"""Finds values that depend on tensors with a graph, but have lost the graph: autograd would differentiate them as 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mlo.ops.callers import users_line

_READ = torch.ops.aten._local_scalar_dense.default
_LEAVES_TORCH = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__}  # which no operator shows


class LostGraphs(TorchDispatchMode):
    """A context (:meth:`follow`) that follows the values of tensors through all operators.

    A value is lost if it is computed, or written, under ``torch.no_grad``, or through ``.data`` or ``detach()``. What
    is computed of it is lost, too. Integers and booleans have no derivative to lose.

    Args:
        inputs: those that require gradients are followed.

    Attributes:
        read: where a followed value became a Python number or a NumPy array (``.item()``); None: nowhere.
    """

    def __init__(self, inputs: Iterable[Tensor | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._lost: dict[int, str] = {}
        self._followed: dict[int, tuple[Any, str]] = {}  # the storage itself, so that its number is not used again
        self.read: str | None = None
        self._exits = _Exits(self._see_exit)
        for tensor in inputs:
            if tensor is not None and tensor.requires_grad and _is_followed(tensor):
                self._followed[_key(tensor)] = tensor.untyped_storage(), "its creation"

    @contextmanager
    def follow(self) -> Iterator[LostGraphs]:
        """The context itself, which also sees the values that leave torch."""
        with self._exits, self:
            yield self

    def where(self, tensor: Tensor) -> str | None:
        """Where a value was lost; None if it was not."""
        if not _is_followed(tensor) or (key := _key(tensor)) not in self._followed:
            return None
        return self._lost.get(key) or (None if tensor.requires_grad else self._followed[key][1])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and mark what it computes and writes."""
        kwargs = kwargs or {}
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor) and _is_followed(t)]
        keys = {_key(tensor) for tensor in given}
        name = str(func).split(".")[1]
        depends = not keys.isdisjoint(self._followed) and not name.endswith("_like") and not name.startswith("new_")
        lost = next((self._lost[key] for key in keys if key in self._lost), None)
        if depends and lost is None and any(self._is_cut(tensor) for tensor in given):
            lost = f"{name}{_line()}"
        done = func(*args, **kwargs)
        if not depends:
            return done
        if func is _READ:
            self.read = self.read or f".item(){_line()}"
        made = [t for t in tree_iter(done) if isinstance(t, Tensor) and _is_followed(t) and _key(t) not in keys]
        for tensor in (*_written(func, args, kwargs), *made):
            self._followed.setdefault(_key(tensor), (tensor.untyped_storage(), f"{name}{_line()}"))
            if lost is not None:
                self._lost.setdefault(_key(tensor), lost)
        return done

    def _see_exit(self, func: Any, tensor: Tensor) -> None:
        if _is_followed(tensor) and _key(tensor) in self._followed:
            self.read = self.read or f".{func.__name__}(){_line()}"

    def _is_cut(self, tensor: Tensor) -> bool:
        return _key(tensor) in self._followed and not (tensor.requires_grad and torch.is_grad_enabled())


class Touched(TorchDispatchMode):
    """A context that sees whether operators read or write certain tensors.

    Args:
        tensors: by name.

    Attributes:
        where: the first of them, and where it was; None: none of them.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = {_key(tensor): name for name, tensor in tensors.items() if _is_followed(tensor)}
        self.where: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and look at its arguments."""
        kwargs = kwargs or {}
        name = str(func).split(".")[1]
        if self.where is None and name not in _LOOKS and not name.endswith("_like") and not name.startswith("new_"):
            given = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor) and _is_followed(t)]
            found = [self._names[_key(tensor)] for tensor in given if _key(tensor) in self._names]
            self.where = f"the parameter {found[0]!r} itself{_line()}" if found else None
        return func(*args, **kwargs)


_LOOKS = frozenset(("detach", "alias"))


class _Exits(TorchFunctionMode):
    """A context that shows tensors whose values leave torch."""

    def __init__(self, see: Callable[[Any, Tensor], None]) -> None:
        self._see = see

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function."""
        if func in _LEAVES_TORCH:
            self._see(func, args[0])
        return func(*args, **(kwargs or {}))


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    if not func._schema.is_mutable:
        return
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from (t for t in tree_iter(value) if isinstance(t, Tensor) and _is_followed(t))


def _is_followed(tensor: Tensor) -> bool:
    has_memory = tensor.layout is torch.strided and not tensor._is_zerotensor()
    return has_memory and (tensor.is_floating_point() or tensor.is_complex())


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _line() -> str:
    """The line of the user's that runs now, in parentheses."""
    file, line, _ = users_line()
    return f" (line {line} of {Path(file).name})"
