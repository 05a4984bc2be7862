"""Diagnostics of a search: operations it would choose, entropy of the weights, sharpness."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh  # has no types
from torch import Tensor
from torch.func import functional_call

from mlo.ops.rng import Randomness, replay
from problems.nas.genotype import derive
from problems.nas.search_space import ArchitectureLogits, CellKind, SearchSpace
from problems.nas.supernet import Supernet

ArchitectureLoss = Callable[[ArchitectureLogits], Tensor]


def count_operations(space: SearchSpace, logits: ArchitectureLogits, kind: CellKind = "normal") -> Counter[str]:
    """Count the operations in one kind of cell of the genotype that `derive` gives: {operation: number of edges}.

    A cell has 2 edges for each node. Synchronizes with the device.

    Raises:
        ValueError: as `derive` does, and if `kind` is neither "normal" nor "reduce".
    """
    return Counter(choice.operation for node in derive(space, logits).cell(kind) for choice in node)


def count_skips(space: SearchSpace, logits: ArchitectureLogits) -> int:
    """Count the skip-connections in the derived normal cell; see :func:`count_operations`.

    Their number grows late in a search. DARTS+ stops a search at 2 (Liang et al. 2019, arXiv:1909.06035).
    """
    return count_operations(space, logits)["skip_connect"]


def entropy(space: SearchSpace, logits: ArchitectureLogits) -> dict[str, Tensor]:
    """The normalized entropy of the operation weights, from 1 (all equal) to 0 (one operation has all the weight).

    For each edge, the entropy of the softmax over its operations is divided by the entropy of equal weights, so that
    edges with different numbers of operations are comparable; an edge with one operation counts as 0. Edge weights are
    ignored.

    Returns:
        {"normal": scalar, "reduce": scalar}, the means over edges, on the logits' device and without a graph. If all
        edges have the same operations, this does not synchronize with the device.

    Raises:
        ValueError: if the logits do not have the shape of the space.
    """
    space.check(logits)
    return {"normal": _entropy(space, "normal", logits.normal), "reduce": _entropy(space, "reduce", logits.reduce)}


def _entropy(space: SearchSpace, kind: CellKind, logits: Tensor) -> Tensor:
    operations = space.operation_logits(kind, logits.detach())
    counts = operations.isfinite().sum(dim=-1)
    edges: Tensor = torch.special.entr(operations.softmax(dim=-1)).sum(dim=-1) / counts.clamp(min=2).log()
    return edges.mean()


def architecture_loss(supernet: Supernet, images: Tensor, labels: Tensor) -> ArchitectureLoss:
    """Return the supernet's cross-entropy on one batch as a pure function of the architecture logits.

    Each call uses the supernet's current weights, as constants, and its current mode. It draws the same noise and
    dropout each time, and changes neither running statistics nor the random state.

    Args:
        supernet: the supernet.
        images: (N, C, H, W), on the supernet's device.
        labels: (N,).
    """
    random_state = Randomness.capture(images.device)

    def loss(logits: ArchitectureLogits) -> Tensor:
        tensors = {name: parameter.detach() for name, parameter in supernet.named_parameters()}
        tensors |= {name: buffer.clone() for name, buffer in supernet.named_buffers()}
        with replay(random_state, images.device):
            predicted: Tensor = functional_call(supernet, tensors, (images, logits))
        return F.cross_entropy(predicted, labels)

    return loss


def dominant_eigenvalue(
    loss: ArchitectureLoss, logits: ArchitectureLogits, tolerance: float = 1e-3, iterations: int = 100
) -> float:
    """The largest eigenvalue of the Hessian of `loss` with respect to the architecture (Zela et al. 2020, section 4).

    It measures the sharpness of the minimum. The Hessian is that of all logits, of normal and reduction cells, as one
    vector: 224 x 224 in the DARTS space. Lanczos' method needs about twenty products of it with vectors, each an exact
    double backward. The eigenvalue is the largest in value, not in magnitude, as in the authors' code (which adds the
    weight decay of the architecture to it). It is never below 0, up to `tolerance`, since adding a constant to the
    logits of a softmax changes nothing. Synchronizes with the device.

    Args:
        loss: a function of the logits, such as :func:`architecture_loss` on validation data.
        logits: the point at which the Hessian is taken.
        tolerance: the relative error of the eigenvalue.
        iterations: the maximum number of restarts of Lanczos' method.

    Raises:
        ValueError: if the loss does not depend on the logits, or it or a derivative is not finite.
        RuntimeError: if `iterations` are not enough.
    """
    shapes = [matrix.shape for matrix in logits]
    sizes = [matrix.numel() for matrix in logits]
    point = torch.cat([matrix.detach().flatten() for matrix in logits]).requires_grad_()
    normal, reduce = (part.view(shape) for part, shape in zip(point.split(sizes), shapes, strict=True))
    value = loss(ArchitectureLogits(normal, reduce))
    if not value.requires_grad:
        raise ValueError("the loss does not depend on the architecture logits; compute it from its argument")
    (gradient,) = torch.autograd.grad(value, point, create_graph=True)

    def product(vector: np.ndarray) -> np.ndarray:
        if not gradient.requires_grad:
            return np.zeros(len(point))
        direction = torch.as_tensor(vector.ravel(), dtype=point.dtype, device=point.device)
        (found,) = torch.autograd.grad(gradient, point, direction, retain_graph=True, materialize_grads=True)
        if not found.isfinite().all():
            raise ValueError(f"the loss is {value.item():g} and its second derivative is not finite; check the data")
        return np.asarray(found.double().cpu().numpy())

    start = np.random.default_rng(0).standard_normal(len(point))
    if not product(start).any():
        return 0.0
    hessian = LinearOperator((len(point), len(point)), matvec=product, dtype=np.float64)
    try:
        (largest,), _ = eigsh(hessian, 1, which="LA", v0=start, tol=tolerance, maxiter=iterations)
    except ArpackNoConvergence as error:
        raise RuntimeError(
            f"the dominant eigenvalue did not converge to a relative error of {tolerance:g} in {iterations} "
            "iterations; increase tolerance or iterations"
        ) from error
    return float(largest)
