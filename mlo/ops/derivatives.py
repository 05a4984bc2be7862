"""Operators whose second derivative torch has not, or has wrong: by the names of their nodes in an autograd graph.

``tests/mlo/ops/test_operators.py`` compares this list with torch's own database of operators.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from mlo.ops.torch_versions import DISTANCES_TWICE

#: how the gradient is differentiated once more: by double backward, or by its forward-mode derivative
Mode = Literal["reverse", "forward"]


class Fault(NamedTuple):
    """An operator that cannot be differentiated again.

    Attributes:
        operator: what a user calls.
        instead: what to use instead of it, or of the product.
        wrong: whether torch's derivative is wrong; otherwise there is none.
    """

    operator: str
    instead: str
    wrong: bool = False


_DIFFERENCE = "use the product 'central'"
_EXACT = "use the product 'exact'"
_FORWARD = "use the product 'forward'"
_COMPILED = Fault(
    "a function compiled by torch.compile",
    "call it uncompiled, and pass Engine(compile=True), which compiles whole gradients",
)
_CTC = ("CtcLossBackward0", "CtcLossBackward1", "CudnnCtcLossBackward0", "CudnnCtcLossBackward1")
_REVERSE_ONLY = {
    "AsStridedScatterBackward0": Fault("as_strided_scatter", _FORWARD, wrong=True),
    # of a loss that differentiates its model
    "ConvolutionBackwardBackward0 with output_padding": Fault("conv_transpose with output_padding", _FORWARD),
}
_REVERSE_FAULTS = {
    "EmbeddingBagBackward0": Fault("embedding_bag", "use nn.Embedding and the sum or mean of its output"),
    "MultiMarginLossBackward0": Fault("multi_margin_loss", _DIFFERENCE),
    "MultilabelMarginLossBackward0": Fault("multilabel_margin_loss", _DIFFERENCE),
    **dict.fromkeys(_CTC, Fault("ctc_loss", _DIFFERENCE)),
    "SegmentReduceBackward0": Fault("segment_reduce", "use scatter_reduce"),
    "EmbeddingBackward0 with scale_grad_by_freq": Fault("embedding with scale_grad_by_freq", _DIFFERENCE, wrong=True),
    "SparseCooTensorWithDimsAndTensorsBackward0": Fault(
        "sparse_coo_tensor of values with a graph", _DIFFERENCE, wrong=True
    ),
    **_REVERSE_ONLY,
}
_FORWARD_FAULTS = {
    **{node: fault for node, fault in _REVERSE_FAULTS.items() if node not in _REVERSE_ONLY},
    "GridSampler2DBackward0": Fault("grid_sample", _EXACT),
    "GridSampler3DBackward0": Fault("grid_sample", _EXACT),
    "IndexReduceBackward0": Fault("index_reduce", f"{_EXACT}, or scatter_reduce"),
    "OrmqrBackward0": Fault("ormqr", _EXACT),
    "ToSparseBackward0": Fault("to_sparse", _EXACT),
    "TriangularSolveBackward0": Fault("triangular_solve", f"{_EXACT}, or torch.linalg.solve_triangular", wrong=True),
    "CholeskyInverseBackward0": Fault("cholesky_inverse", f"{_EXACT}, or torch.linalg.inv", wrong=True),
    "ScatterReduceBackward0 with prod": Fault("scatter_reduce with 'prod'", f"{_EXACT}, or torch.prod", wrong=True),
}
FAULTS: dict[Mode, dict[str, Fault]] = {"reverse": _REVERSE_FAULTS, "forward": _FORWARD_FAULTS}

#: the forward derivative of their gradient is missing or wrong, unless the gradient is taken with a graph of its own:
#: torch then computes it by other formulas
NEEDS_GRAPH = frozenset(
    [
        "BinaryCrossEntropyBackwardBackward0",
        "CumprodBackward0",
        "LinalgDetBackward0",
        "LinalgEigBackward0",
        "LinalgSlogdetBackward0",
        "LinalgSolveExBackward0",
        "LogitBackward0",
        "MishBackward0",
        "NativeGroupNormBackward0",
        "ProdBackward0",
        "ProdBackward1",
        "SiluBackward0",
    ]
)

#: right only if computed with elementary operators (:class:`mlo.ops.differentiable.ElementaryOperators`)
_CROSS_ENTROPY = "GeneratedBackwardFor_torch_nn__linear_cross_entropy_batch_chunked"
_REPLACED_ALWAYS = frozenset(
    [
        "HardsigmoidBackward0",
        f"{_CROSS_ENTROPY}_defaultBackward",
        f"{_CROSS_ENTROPY}_no_reduction_defaultBackward",
        # of losses that differentiate their model
        "BatchNormBackwardBackward0",
        "CudnnBatchNormBackwardBackward0",
        "MiopenBatchNormBackwardBackward0",
        "NativeBatchNormBackwardBackward0",
        "NativeLayerNormBackwardBackward0",
        "PdistBackwardBackward0",
    ]
)
_DISTANCES = frozenset(["CdistBackward0", "EuclideanDistBackward0", "PdistBackward0"])
_LOSSES = frozenset(
    [
        "HuberLossBackward0",
        "MseLossBackward0",  # of a target that has no tangent, but a gradient
        "SoftMarginLossBackward0",
    ]
)
REPLACED: dict[Mode, frozenset[str]] = {
    "reverse": _REPLACED_ALWAYS if DISTANCES_TWICE else _REPLACED_ALWAYS | _DISTANCES,
    "forward": _REPLACED_ALWAYS | _DISTANCES | _LOSSES,
}


def name_of(node: Any) -> str:
    """The name of a node, by which the operator is listed here."""
    name: str = node.name()
    if name == "ScatterReduceBackward0" and node._saved_reduce == "prod":
        return f"{name} with prod"
    if name == "EmbeddingBackward0" and node._saved_scale_grad_by_freq:
        return f"{name} with scale_grad_by_freq"
    if name == "ConvolutionBackwardBackward0" and node._saved_transposed and any(node._saved_output_padding):
        return f"{name} with output_padding"
    return name


def custom_function(node: Any) -> type[torch.autograd.Function] | None:
    """The user's autograd.Function of a node, if it is of one."""
    return getattr(node, "_forward_cls", None)


def fault_of(function: type[torch.autograd.Function], mode: Mode) -> Fault | None:
    """What an autograd.Function lacks for ``mode``, as far as its methods say.

    One without a forward-mode derivative may not be called where that is taken. Double backward through one that is
    ``once_differentiable`` ends without an error if it follows only the inputs that it reaches.
    """
    if function.__module__.startswith("torch._functorch."):
        return _COMPILED
    if mode == "forward" or getattr(function.backward, "__code__", None) is not _ONCE:
        return None
    instead = f"{_DIFFERENCE}, or a backward that is not once_differentiable"
    return Fault(f"the autograd.Function {function.__name__!r}", instead)


_ONCE = once_differentiable(lambda context: None).__code__
_NO_REVERSE = re.compile(r"derivative for '?(?:aten::)?(\w+)'? is not implemented")
_NO_FORMULA = re.compile(r"Trying to backward through (\S+?)(?:\.default)? but no autograd formula was registered")
_NO_FORWARD = re.compile(r"Trying to use forward AD with (?:aten::)?(\w+) that does not support it")


def fault_in(message: str) -> tuple[Mode, Fault] | None:
    """Which operator an error of torch is about, and for which mode it has no derivative; None for other errors."""
    if found := _NO_REVERSE.search(message):
        return "reverse", Fault(_operator(found[1]), _DIFFERENCE)
    if found := _NO_FORMULA.search(message):
        return "reverse", Fault(
            found[1], f"{_DIFFERENCE}, or register its derivative by torch.library.register_autograd"
        )
    if found := _NO_FORWARD.search(message):
        return "forward", Fault(_operator(found[1]), _EXACT)
    for part, (mode, fault) in _OTHER_MESSAGES.items():
        if part in message:
            return mode, fault
    return None


_OTHER_MESSAGES: dict[str, tuple[Mode, Fault]] = {
    "must implement the jvp function": (
        "forward",
        Fault("an autograd.Function without a method jvp", f"{_EXACT}, or define its method jvp"),
    ),
    "ZeroTensors are immutable": ("forward", Fault("an operator with an argument without a tangent", _EXACT)),
    "output_padding is not supported": ("reverse", Fault("conv_transpose with output_padding", _FORWARD)),
    "expected sparse coordinate tensor layout": ("reverse", Fault("an operator of sparse CSR tensors", _DIFFERENCE)),
    "functions with out=... arguments": (
        "reverse",
        Fault("CrossMapLRN2d or another operator that writes with out=", "use nn.LocalResponseNorm"),
    ),
    "does not currently support double backward": ("reverse", _COMPILED),
    "from the 'Sparse": ("forward", Fault("a sparse tensor or gradient", f"{_EXACT}, or dense tensors (sparse=False)")),
    "does not support 3rd+ order": ("reverse", Fault("batch_norm called by its private name", "use nn.BatchNorm")),
}


def _operator(name: str) -> str:
    """The public name of an operator whose derivative is named so."""
    for affix in ("_backward", "_forward"):
        name = name.removesuffix(affix)
    return name.removeprefix("_").removeprefix("thnn_fused_")


def differentiates(names: Collection[str]) -> bool:
    """Whether the operators of a loss show that it differentiates its model."""
    return any("BackwardBackward" in name for name in names)
