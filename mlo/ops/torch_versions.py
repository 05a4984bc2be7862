"""What the installed release of torch can do. No other file looks at its version.

A capability is decided by the presence of a name if there is one that comes with it, and by the version otherwise.
"""

from __future__ import annotations

import inspect

import torch
import torch.utils.checkpoint

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
