"""Compilation of gradients and curvature products with torch.compile.

A compiled module cannot be differentiated twice, so mlo compiles the gradient as a whole, from the first operator of
the loss to the gradient. Where second derivatives are needed, the backward of that compiled gradient is compiled too;
it computes the curvature product. On a GPU, functions that keep no autograd graph are captured as CUDA graphs, because
the kernel launches of a small network take longer than its arithmetic. They are not if a whole round becomes a graph.
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
from torch.utils._pytree import tree_leaves, tree_map_only

from mlo import errors
from mlo.ops import torch_versions
from mlo.ops.rng import CPU

Key = tuple[str, *tuple[Hashable, ...]]
STEPS = 5  # steps in one compiled function: half the time of a small network's step is the overhead of the call
SMALL_GRAPH = 2**18  # bytes: steps of which more than this is kept are faster one by one
_OPTIONS: dict[str, Any] = {
    "fullgraph": True,
    **({"isolate_recompiles": True} if torch_versions.ISOLATES_RECOMPILES else {}),
    # the same random numbers as in eager mode, since a pass may be repeated there
    "options": {"fallback_random": True, "triton.cudagraphs": False},
}
_CAPTURED = {"triton.cudagraphs": True, "triton.cudagraph_skip_dynamic_graphs": True}  # used while shapes do not change


class Compiler:
    """Compiles functions of problems. A problem that cannot be compiled is reported once, and runs uncompiled.

    Args:
        device: the device of the modules.
        rounds_captured: whether rounds are recorded as CUDA graphs, so that the functions themselves must not be.

    Attributes:
        scalars_on: where functions take numbers that change: on the CPU, which is fastest, or where a graph reads them.
        ran: the compiled functions that have run.
        failed: {function that cannot be compiled, but whose work others do: reason}.
        refused: {problem that cannot be compiled: reason}.

    Raises:
        ConfigError: if this release of torch cannot compile gradients.
    """

    def __init__(self, device: torch.device, rounds_captured: bool = False) -> None:
        _check_torch()
        import torch._dynamo  # takes a second, so only if compilation is requested
        import torch._functorch.config

        # In this release of torch, torch.autograd.grad inside a compiled function must be enabled, and a compiled
        # backward that runs more than once must not donate its buffers. Both settings apply to the whole process.
        torch._dynamo.config.trace_autograd_ops = True
        torch._functorch.config.donated_buffer = False
        self._on_gpu = device.type == "cuda"
        self._captures, self.scalars_on = self._on_gpu and not rounds_captured, device if rounds_captured else CPU
        self._compiled: dict[Key, Callable[..., Any]] = {}
        self.ran: set[Key] = set()
        self.failed: dict[Key, str] = {}
        self.refused: dict[str, str] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._compiled

    def add(self, key: Key, function: Callable[..., Any], leaves_graph: bool) -> None:
        """Register ``function``, to be compiled at its first call.

        Args:
            key: identifies it; the first part is the name of its problem.
            leaves_graph: whether its results will be differentiated.
        """
        # torch counts recompilations per code object, so each function gets its own
        of = cast(FunctionType, function)
        own = FunctionType(of.__code__.replace(), of.__globals__, of.__name__, None, of.__closure__)
        if self._captures and not leaves_graph:
            options = {**_OPTIONS, "options": {**_OPTIONS["options"], **_CAPTURED}}
            self._compiled[key] = _copied_out(torch.compile(own, **options))
        else:
            self._compiled[key] = torch.compile(own, **_OPTIONS)

    def capture_functions(self) -> None:
        """From now on, capture functions, since rounds are not. They are compiled again."""
        self._captures, self.scalars_on = self._on_gpu, CPU
        self._compiled.clear()
        self.ran.clear()

    def call(self, key: Key, *arguments: Any, spare: bool = False) -> Any:
        """The result of the compiled function; None if it cannot be compiled, with one warning per problem.

        Args:
            spare: whether other compiled functions can do the same. Then a failure leads to a warning only if the
                reason is that the function was recompiled too often.
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
                        f"problem {problem!r}: its steps are compiled one by one from now on, not several together, "
                        "because its optimizer's options (other than the learning rate) or the shapes of what its loss "
                        "reads change too often",
                        stacklevel=2,
                    )
            else:
                self.refuse(problem, _reason(error))
            return None
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # as of an autograd.Function that torch.func cannot run
            if not spare or key in self.ran:
                raise
            self.failed[key] = _reason(error)
            return None
        return done

    def refuse(self, problem: str, reason: str) -> None:
        """Run the problem without compilation from now on, and warn about it."""
        self.refused[problem] = reason
        warnings.warn(f"problem {problem!r} runs without compilation: {reason}", stacklevel=2)


def _check_torch() -> None:
    if not torch_versions.COMPILES_GRADIENTS:
        raise errors.ConfigError(
            f"compile=True: torch {torch.__version__} cannot compile gradients; leave it out, or install torch 2.11 or "
            "later"
        )


def _copied_out(captured: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its results copied out of the CUDA graph's memory, which the next replay overwrites."""

    def call(*arguments: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # results of earlier calls are no longer in use
        return tree_map_only(Tensor, torch.clone, captured(*arguments))

    return call


def _reason(error: Exception) -> str:
    """The reason in one line, with the line of the user's code if torch names it."""
    if isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit):
        return "what its loss reads, or the shape of its batches, changes so often that torch stopped recompiling"
    if isinstance(error, torch._dynamo.exc.BackendCompilerFailed):
        inner = error.inner_exception
        said = f"{type(inner).__name__}: {inner}".partition("\n")[0]
        return f"torch {torch.__version__} fails to generate code for it ({said}); another release of torch may succeed"
    message = str(error).strip()
    lines = [found for found in re.findall(r'File "(.+?)", line (\d+)', message) if not _ours(found[0])]
    return message.partition("\n")[0] + (f" ({lines[-1][0]}, line {lines[-1][1]})" if lines else "")


def _ours(file: str) -> bool:
    return any(file.startswith(str(Path(module.__file__ or "").parent)) for module in (torch, errors))


def _compile_backward(gradients: Sequence[Tensor | None], states: Mapping[str, Any]) -> None:
    """Compile the gradients' backward now, where a failure can be handled; torch would do it at its first use."""
    kept = [gradient for gradient in gradients if gradient is not None and gradient.requires_grad]
    inputs = [t for t in tree_leaves(states) if isinstance(t, Tensor) and t.requires_grad]
    if kept:
        zeros = [torch.zeros_like(gradient) for gradient in kept]
        torch.autograd.grad(kept, inputs, zeros, retain_graph=True, allow_unused=True)
