"""Whole gradient passes through torch.compile: a compiled module has no second derivative, a compiled gradient has.

A pass is compiled from the loss's first operator to its gradient. Where second derivatives are wanted, the gradient
comes with a compiled backward, which is the curvature product. On a card, functions that leave no graph behind are
captured as CUDA graphs: their launches, which cost a small network more than its arithmetic, become one.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mlo import errors

Key = tuple[str, *tuple[Hashable, ...]]
STEPS = 5  # taken in one compiled function: half of what a step of a small network costs is the call's, not its own
SMALL_GRAPH = 2**18  # bytes of a step's graph up to which they are; at some MB each is faster by itself
_OPTIONS: dict[str, Any] = {
    "fullgraph": True,
    "isolate_recompiles": True,
    "options": {"fallback_random": True},  # random numbers as without compilation: a pass may be repeated either way
}
_CAPTURED = {"triton.cudagraphs": True, "triton.cudagraph_skip_dynamic_graphs": True}  # while shapes stay


class Compiler:
    """Compiles functions of problems; what cannot be compiled is said once, and left alone from then on.

    Args:
        device: where the modules are.

    Attributes:
        ran: the functions that have run compiled.
        failed: {function that could not be compiled, while others do the same: the reason}.
        refused: {problem that runs without compilation: the reason}.
    """

    def __init__(self, device: torch.device) -> None:
        import torch._dynamo  # a second's import, for those alone who compile
        import torch._functorch.config

        # torch.autograd.grad inside a compiled function is behind a switch in this release of torch, and a compiled
        # backward that is to run more than once must not give its buffers away; both are settings of the process
        torch._dynamo.config.trace_autograd_ops = True
        torch._functorch.config.donated_buffer = False
        self._on_card = device.type == "cuda"
        self._compiled: dict[Key, Callable[..., Any]] = {}
        self.ran: set[Key] = set()
        self.failed: dict[Key, str] = {}
        self.refused: dict[str, str] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._compiled

    def add(self, key: Key, function: Callable[..., Any], leaves_graph: bool) -> None:
        """Compile ``function`` when it is first called; the first part of ``key`` is the problem that it is of.

        Args:
            leaves_graph: whether what it gives is to be differentiated.
        """
        # torch counts compilations by code object: each gets its own
        of = cast(FunctionType, function)
        own = FunctionType(of.__code__.replace(), of.__globals__, of.__name__, None, of.__closure__)
        if self._on_card and not leaves_graph:
            options = {**_OPTIONS, "options": {**_OPTIONS["options"], **_CAPTURED}}
            self._compiled[key] = _copied_out(torch.compile(own, **options))
        else:
            self._compiled[key] = torch.compile(own, **_OPTIONS)

    def call(self, key: Key, *arguments: Any, spare: bool = False) -> Any:
        """What the function gives; None if its problem cannot be compiled, which is warned of once.

        Args:
            spare: whether the same is done by other compiled functions if this one cannot be; only if that is for what
                changes from call to call, it is warned of here.
        """
        problem = key[0]
        if problem in self.refused or key in self.failed:
            return None
        try:
            done = self._compiled[key](*arguments)
            if key not in self.ran:
                _compile_backward(done[1], arguments[0])
                self.ran.add(key)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            if spare:
                self.failed[key] = _reason(error)
                if isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit):
                    warnings.warn(
                        f"problem {problem!r}: its steps are compiled one by one from now on, not several as one, "
                        "for its optimizer's options (other than the learning rate) or the form of what its loss reads "
                        "change too often",
                        stacklevel=2,
                    )
            else:
                self.refuse(problem, _reason(error))
            return None
        return done

    def refuse(self, problem: str, reason: str) -> None:
        """Leave the problem as it is from now on."""
        self.refused[problem] = reason
        warnings.warn(f"problem {problem!r} runs without compilation: {reason}", stacklevel=2)


def _copied_out(captured: Callable[..., Any]) -> Callable[..., Any]:
    """The function with what it gives copied out of the CUDA graph's memory, where the next replay would write."""

    def call(*arguments: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # nothing of earlier calls is in use
        return tree_map_only(Tensor, torch.clone, captured(*arguments))

    return call


def _reason(error: Exception) -> str:
    """In a line, with the place in the user's code where torch names one."""
    if isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit):
        return "what its loss reads, or the form of its batches, changes so often that torch gave up compiling anew"
    told = str(error).strip()
    places = [place for place in re.findall(r'File "(.+?)", line (\d+)', told) if not _ours(place[0])]
    return told.partition("\n")[0] + (f" ({places[-1][0]}, line {places[-1][1]})" if places else "")


def _ours(file: str) -> bool:
    return any(file.startswith(str(Path(module.__file__ or "").parent)) for module in (torch, errors))


def _compile_backward(gradients: Sequence[Tensor | None], parameters: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Compile the gradients' own backward now, where a failure can still be met; torch waits until it is needed."""
    kept = [gradient for gradient in gradients if gradient is not None and gradient.requires_grad]
    inputs = [p for named in parameters.values() for p in named.values() if p.requires_grad]
    if kept:
        zeros = [torch.zeros_like(gradient) for gradient in kept]
        torch.autograd.grad(kept, inputs, zeros, retain_graph=True, allow_unused=True)
