"""Iterative linear solvers: conjugate gradient, Neumann series, minimal residual and Nyström approximation.

Each solves A z = b, given only a function ``matvec`` that computes A u, and returns z with its relative residual.
Vectors are tuples of tensors. The solvers do not change their arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mlo.ops.vectors import Vector, add, add_, copied, dot, flat, norm, readable, scaled, shaped

MatVec = Callable[[Vector], Vector]


def conjugate_gradient(
    matvec: MatVec, b: Vector, iterations: int, tolerance: float, start: Vector | None = None
) -> tuple[Vector, Tensor]:
    """Solve A z = b for a symmetric, positive definite A by conjugate gradient (Hestenes and Stiefel 1952).

    The iteration stops early when the relative residual reaches ``tolerance``, or at a direction of non-positive
    curvature. On a GPU the remaining iterations still run, but leave the solution unchanged, so that the CPU need not
    wait for the device.

    Args:
        matvec: u -> A u.
        b: the right-hand side.
        iterations: maximum number of iterations, each with one product.
        tolerance: relative residual at which to stop.
        start: the initial z; it costs one more product. One that is further off than zero is dropped. None: zero.

    Returns:
        The solution z, and |A z - b| / |b|, a scalar tensor, as updated by the iteration.
    """
    solution, direction = _begin(matvec, b, start)
    residual = copied(direction)
    size, whole = dot(residual, residual), dot(b, b)
    tolerance = max(tolerance, torch.finfo(whole.dtype).eps)  # below it there is only rounding
    active = size > tolerance**2 * whole
    for _ in range(iterations):
        if _finished(active):
            break
        image = matvec(direction)
        curvature = dot(direction, image)
        active = active & (curvature > 0)
        stride = torch.where(active, size / torch.where(active, curvature, 1.0), 0.0)
        add_(solution, direction, stride)
        add_(residual, image, -stride)
        previous, size = size, dot(residual, residual)
        active = active & (size > tolerance**2 * whole)
        direction = add(residual, direction, torch.where(previous > 0, size / previous, 0.0))
    return solution, (size / whole.clamp(min=torch.finfo(whole.dtype).tiny)).sqrt()


def neumann_series(
    matvec: MatVec, b: Vector, terms: int, rate: float | Tensor, start: Vector | None = None
) -> tuple[Vector, Tensor]:
    """Approximate the solution of A z = b by the Neumann series z = rate * sum_{k < terms} (I - rate * A)^k b.

    The series converges if all eigenvalues of A are between 0 and 2 / ``rate``. From the first term on that is larger
    than the one before, terms are left out, so that the result stays finite.

    Args:
        matvec: u -> A u.
        b: the right-hand side.
        terms: number of terms; each after the first takes one product.
        rate: the step size of the series.
        start: an approximate solution. The series then approximates the solution of A dz = b - A start, and the result
            is start + dz; this costs one more product. One that is further off than zero is dropped. None: zero.

    Returns:
        The solution z, and |last term| / |b|, a scalar tensor. The last term, before it is multiplied by ``rate``, is
        the residual of the sum of the terms before it.
    """
    begun, term = _begin(matvec, b, start)
    term = copied(term)
    total = copied(term)
    size, whole = norm(term), norm(b)
    active = size > 0
    for _ in range(terms - 1):
        if _finished(active):
            break
        add_(term, matvec(term), -rate)
        last, size = size, norm(term)
        active = active & (size <= last)
        if readable(active):
            if active:
                add_(total, term)
        else:
            total = _chosen(active, add(total, term), total)
    solution = scaled(total, rate) if start is None else add(begun, total, rate)
    return solution, size / whole.clamp(min=torch.finfo(whole.dtype).tiny)


def minimal_residual(matvec: MatVec, b: Vector, terms: int, start: Vector | None = None) -> tuple[Vector, Tensor]:
    """Solve A z = b by steps along the residual r, each as long as makes the next residual smallest.

    These are the steps z + a r of the Neumann series, but with the rate a = <r, A r> / |A r|^2 instead of a fixed one
    (Saad 2003, section 5.3.2). The residual never grows, so it cannot diverge. It stops at a direction of non-positive
    curvature.

    Args:
        matvec: u -> A u, for a symmetric A.
        b: the right-hand side.
        terms: number of steps; each takes one product.
        start: as for :func:`neumann_series`.

    Returns:
        The solution z, and |A z - b| / |b|, a scalar tensor.
    """
    solution, residual = _begin(matvec, b, start)
    residual = copied(residual)
    whole = norm(b)
    active = whole > 0
    for _ in range(terms):
        if _finished(active):
            break
        image = matvec(residual)
        curvature, size = dot(residual, image), dot(image, image)
        active = active & (curvature > 0)
        rate = torch.where(active, curvature / torch.where(active, size, 1.0), 0.0)
        add_(solution, residual, rate)
        add_(residual, image, -rate)
    return solution, norm(residual) / whole.clamp(min=torch.finfo(whole.dtype).tiny)


def _begin(matvec: MatVec, b: Vector, start: Vector | None) -> tuple[Vector, Vector]:
    """A copy of ``start``, or zeros if that leaves a smaller residual, and the residual."""
    zero = tuple([torch.zeros_like(part) for part in b])
    if start is None:
        return zero, b
    residual = add(b, matvec(start), -1.0)
    nearer = norm(residual) < norm(b)  # with NaN it is not
    if readable(nearer):
        return (copied(start), residual) if nearer else (zero, b)
    return _chosen(nearer, start, zero), _chosen(nearer, residual, b)


def nystrom(matvec: MatVec, b: Vector, probes: Sequence[Vector], damping: float | None) -> tuple[Vector, Tensor]:
    """Approximate the solution of (A + damping * I) z = b by a low-rank Nyström approximation of a symmetric A.

    With the orthonormalized probes P and Y = A P, A is approximated by Y (P'Y)^-1 Y'. It is exact once there are as
    many probes as variables.

    Args:
        matvec: u -> A u.
        b: the right-hand side.
        probes: linearly independent vectors; each takes one product, and the residual one more.
        damping: a positive number: the system is solved by the Woodbury identity (Hataya and Yamada 2023). None:
            nothing is added; where the approximation has no eigenvalue, its smallest one is taken (as Frangella, Tropp
            and Udell 2023 do to precondition), and the solution is scaled such that the residual is smallest.

    Returns:
        The solution z, and |b - (A + damping * I) z| / |b|, a scalar tensor.
    """
    basis = _orthonormal(probes)
    images = torch.stack([flat(matvec(probe)) for probe in basis])
    core = torch.stack([flat(probe) for probe in basis]) @ images.T
    core, right = (core + core.T) / 2, flat(b)
    if damping is None:
        found = _low_rank_inverse(core, images, right)
    else:
        small = _tame(core + damping**-1 * (images @ images.T))
        weights = torch.linalg.pinv(small, hermitian=True) @ (images @ right)
        found = (right - images.T @ weights / damping) / damping
    solution = shaped(found, b)
    image = matvec(solution)
    if damping is None:
        size, curvature = dot(image, image), dot(image, b)
        scale = torch.where(size > 0, curvature / torch.where(size > 0, size, 1.0), 0.0).clamp(min=0.0)
        solution, residual = scaled(solution, scale), add(b, image, -scale)
    else:
        residual = add(add(b, image, -1.0), solution, -damping)
    return solution, norm(residual) / norm(b).clamp(min=torch.finfo(found.dtype).tiny)


def _low_rank_inverse(core: Tensor, images: Tensor, right: Tensor) -> Tensor:
    """The inverse of Y C^-1 Y' times ``right``, where what is outside of its range counts as its smallest eigenvalue.

    Eigenvalues that are not above rounding, or negative, count as outside.
    """
    values, vectors = torch.linalg.eigh(_tame(core))
    factor = images.T @ (vectors * _over(values).sqrt())  # of the approximation: it times its transpose
    eigenvalues, directions = torch.linalg.eigh(_tame(factor.T @ factor))
    inverse = _over(eigenvalues)
    directions = factor @ (directions * inverse.sqrt())
    outside = inverse.max()  # zero if there is no positive curvature
    inside: Tensor = directions @ ((inverse - outside * (inverse > 0)) * (directions.T @ right))
    return inside + outside * right


def _tame(matrix: Tensor) -> Tensor:
    """The matrix with 0 for what is not finite, for which torch's decompositions fail; it spreads by other products."""
    return torch.where(matrix.isfinite(), matrix, 0.0)


def _over(values: Tensor) -> Tensor:
    """One over the values that are well above zero, otherwise zero."""
    least = torch.finfo(values.dtype).eps ** 0.5 * values.abs().max()
    there = values > least
    return torch.where(there, 1 / torch.where(there, values, 1.0), 0.0)


def _orthonormal(vectors: Sequence[Vector]) -> list[Vector]:
    basis = torch.linalg.qr(torch.stack([flat(vector) for vector in vectors], dim=1)).Q
    return [shaped(column, vectors[0]) for column in basis.T]


def _chosen(active: Tensor, one: Vector, other: Vector) -> Vector:
    return tuple(torch.where(active, a, b) for a, b in zip(one, other, strict=True))


def _finished(active: Tensor) -> bool:
    """Whether the iteration can stop; only known on the CPU, since a GPU would have to be waited for."""
    return readable(active) and not bool(active)
