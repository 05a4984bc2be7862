"""What the installed release of torch can do. No other file looks at its version.

A capability is decided by the presence of a name if there is one that comes with it, and by the version otherwise.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

_CHECKPOINT = vars(torch.utils.checkpoint)

#: the private function of torch.utils.checkpoint that all non-reentrant checkpointing goes through; its first argument
#: is the function to recompute
CHECKPOINT_ENTRY = next(
    name
    for name in ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator")
    if name in _CHECKPOINT
)

#: whether checkpointed activations have a forward derivative: from 2.13 on. Before, they are saved by an operator
#: without one
CHECKPOINTS_FORWARD = "_NoopSaveInputs" not in _CHECKPOINT

#: whether compiled functions can contain torch.autograd.grad: from 2.11 on. A look at the setting would import the
#: compiler, which takes a second
COMPILES_GRADIENTS = torch.__version__ >= "2.11.0a0"

#: whether calls of torch.compile can count their recompilations separately: from 2.13 on
ISOLATES_RECOMPILES = "isolate_recompiles" in inspect.signature(torch.compile).parameters

#: whether the random state of a GPU can be read and set back while a CUDA graph is recorded: from 2.10 on
RECORDS_DRAWS = torch.__version__ >= "2.10.0a0"

#: whether torch.cdist and pdist have second derivatives: in 2.14, but not in 2.11
DISTANCES_TWICE = torch.__version__ >= "2.14.0a0"

#: whether a saved tensor can be looked at as it is kept: not before 2.11, where it is unpacked
SHOWS_SAVED = hasattr(torch._C._autograd.SavedTensor, "data")


def packed(node: Any) -> Iterator[Tensor]:
    """The tensors that a node of an autograd graph has saved, but for those that saved-tensor hooks have packed."""
    prefix = "_raw_saved_" if SHOWS_SAVED else "_saved_"
    for name in dir(node):
        if name.startswith(prefix):
            try:
                found = getattr(node, name)
            except RuntimeError:  # freed
                continue
            for saved in found if isinstance(found, tuple) else (found,):
                tensor = saved.data if SHOWS_SAVED else saved
                if isinstance(tensor, Tensor):
                    yield tensor
