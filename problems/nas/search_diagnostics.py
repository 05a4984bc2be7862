"""Watching a search: what it would keep, how decided it is, how sharp its minimum, and when to stop it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh  # has no types
from torch import Tensor
from torch.func import functional_call

from mlo.ops.rng import Randomness, replay
from problems.nas.genotype import derive
from problems.nas.space import ArchitectureLogits, CellKind, SearchSpace
from problems.nas.supernet import Supernet

ArchitectureLoss = Callable[[ArchitectureLogits], Tensor]


def kept(space: SearchSpace, logits: ArchitectureLogits, kind: CellKind = "normal") -> Counter[str]:
    """Count the operations that `derive` would keep now in one kind of cell: {operation: edges}, of 2 a node.

    Waits for the device. Raises ValueError as `derive` does, and for another kind of cell.
    """
    return Counter(choice.operation for node in derive(space, logits).cell(kind) for choice in node)


def skips(space: SearchSpace, logits: ArchitectureLogits) -> int:
    """Count the skip-connections that `derive` would keep now in the normal cell; see :func:`kept`.

    Late in a search they take over. DARTS+ stops a search once there are 2 (Liang et al. 2019, arXiv:1909.06035).
    """
    return kept(space, logits)["skip_connect"]


def entropy(space: SearchSpace, logits: ArchitectureLogits) -> dict[str, Tensor]:
    """{"normal": ..., "reduce": ...}: how undecided the edges are, from 1 (all operations alike) to 0 (one alone).

    The mean over edges of the entropy of the operations' softmax, in units of the entropy of a uniform choice between
    the edge's operations, so that stages with fewer operations compare; an edge with one operation counts 0. Edge
    weights are left out. Scalars on the logits' device, without a graph; a space with the same operations on every
    edge does not wait for the device. Raises ValueError if the shapes are not those of the space.
    """
    space.check(logits)
    return {"normal": _entropy(space, "normal", logits.normal), "reduce": _entropy(space, "reduce", logits.reduce)}


def _entropy(space: SearchSpace, kind: CellKind, logits: Tensor) -> Tensor:
    operations = space.operation_logits(kind, logits.detach())
    counts = operations.isfinite().sum(dim=-1)
    edges: Tensor = torch.special.entr(operations.softmax(dim=-1)).sum(dim=-1) / counts.clamp(min=2).log()
    return edges.mean()


def architecture_loss(supernet: Supernet, images: Tensor, labels: Tensor) -> ArchitectureLoss:
    """Return the supernet's cross-entropy on one batch as a pure function of the architecture's logits.

    In the supernet's present mode. Weights are constants and running statistics stay as they are; every call draws the
    same noise and dropout, and leaves the random state as it was.

    Args:
        supernet: whose weights, as they are at each call, it uses.
        images: (N, C, H, W), on the supernet's device.
        labels: (N,).
    """
    begun = Randomness.capture(images.device)

    def loss(logits: ArchitectureLogits) -> Tensor:
        tensors = {name: parameter.detach() for name, parameter in supernet.named_parameters()}
        tensors |= {name: buffer.clone() for name, buffer in supernet.named_buffers()}
        with replay(begun, images.device):
            predicted: Tensor = functional_call(supernet, tensors, (images, logits))
        return F.cross_entropy(predicted, labels)

    return loss


def dominant_eigenvalue(
    loss: ArchitectureLoss, logits: ArchitectureLogits, tolerance: float = 1e-3, iterations: int = 100
) -> float:
    """The largest eigenvalue of the Hessian of `loss` in the architecture: its sharpness (Zela et al. 2020, section 4).

    All logits, of normal and reduction cells, are one vector; its Hessian, 224 x 224 in DARTS' space, is known by exact
    products with vectors alone, a double backward each, of which Lanczos' method needs some twenty. The largest in
    value, as in the authors' code, who add the architecture's weight decay to it; never below 0, up to `tolerance`,
    since a softmax does not see what is added to all of its logits. Waits for the device.

    Args:
        loss: for one, :func:`architecture_loss` on validation data.
        logits: where.
        tolerance: relative error of the eigenvalue.
        iterations: restarts of the method, at most.

    Raises ValueError if the loss or a derivative is not finite or does not depend on the logits, RuntimeError if
    `iterations` were not enough.
    """
    shapes = [matrix.shape for matrix in logits]
    sizes = [matrix.numel() for matrix in logits]
    point = torch.cat([matrix.detach().flatten() for matrix in logits]).requires_grad_()
    normal, reduce = (part.view(shape) for part, shape in zip(point.split(sizes), shapes, strict=True))
    value = loss(ArchitectureLogits(normal, reduce))
    if not value.requires_grad:
        raise ValueError("the loss does not depend on the architecture's logits; compute it from those it is given")
    (gradient,) = torch.autograd.grad(value, point, create_graph=True)

    def product(vector: np.ndarray) -> np.ndarray:
        if not gradient.requires_grad:
            return np.zeros(len(point))
        direction = torch.as_tensor(vector.ravel(), dtype=point.dtype, device=point.device)
        (found,) = torch.autograd.grad(gradient, point, direction, retain_graph=True, materialize_grads=True)
        if not found.isfinite().all():
            raise ValueError(f"the loss is {value.item():g} and its second derivative is not finite; look at the data")
        return np.asarray(found.double().cpu().numpy())

    start = np.random.default_rng(0).standard_normal(len(point))
    if not product(start).any():
        return 0.0
    hessian = LinearOperator((len(point), len(point)), matvec=product, dtype=np.float64)
    try:
        (largest,), _ = eigsh(hessian, 1, which="LA", v0=start, tol=tolerance, maxiter=iterations)
    except ArpackNoConvergence as error:
        raise RuntimeError(
            f"the dominant eigenvalue was not found to {tolerance:g} in {iterations} iterations; raise either of them"
        ) from error
    return float(largest)


def stop_at(history: Sequence[float], window: int = 5, lag: int = 4, ratio: float = 1.3, first: int = 10) -> int | None:
    """The epoch to go back to, if the search should have stopped by now; else None (Zela et al. 2020, section 4.3).

    The mean eigenvalue around an epoch is that over `window` epochs with it in the middle. Once it exceeds `ratio`
    times the one `lag` epochs earlier, the search stops, and the genotype of that earlier epoch is its result. With the
    defaults, those of the authors' code, the first decision is at 17 entries, for epoch 10.

    Args:
        history: :func:`dominant_eigenvalue` after each epoch, from epoch 0 on; where it is taken every k epochs,
            `lag`, `first` and the result count in entries too.
        window: odd.
        lag: entries between the two means.
        ratio: above 0.
        first: the first entry that may be gone back to.

    Returns:
        The index of the entry; the first one, if there are several.

    Raises ValueError for an option that does not fit, and for an entry that is not finite.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be an odd number of epochs, not {window}; its mean belongs to the middle one")
    if lag < 1 or first < 0 or not ratio > 0:
        raise ValueError(f"lag={lag}, first={first}, ratio={ratio}: they must be at least 1, at least 0, and above 0")
    wrong = [f"{index} ({value})" for index, value in enumerate(history) if not math.isfinite(value)]
    if wrong:
        raise ValueError(f"the eigenvalues of these epochs are not finite: {', '.join(wrong)}")
    half = window // 2

    def mean_around(epoch: int) -> float:
        return math.fsum(history[epoch - half : epoch + half + 1]) / window

    for earlier in range(max(first, half), len(history) - half - lag):
        if mean_around(earlier + lag) > ratio * mean_around(earlier):
            return earlier
    return None
