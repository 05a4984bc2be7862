"""Families of operators, of the outputs of a layer: a matrix of 4 rows of 4 numbers between -1 and 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Beta, Dirichlet, Gamma, MultivariateNormal, Normal, StudentT, kl_divergence

from .case import Case, cases

INDEX = torch.tensor([2, 0, 2])
ROWS = torch.tensor([[0, 1, 2, 0], [3, 0, 1, 1], [2, 2, 0, 3], [1, 0, 3, 2]])
EYE = 3 * torch.eye(4, dtype=torch.float64)


class Op(nn.Module):
    """An operator as a layer."""

    def __init__(self, op: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: Tensor) -> Any:
        return self.op(x)


def of(op: Callable[[Tensor], Any]) -> dict[str, Any]:
    return {"module": lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Op(op)), "x": lambda: (torch.randn(4, 4),)}


def definite(h: Tensor) -> Tensor:
    return h @ h.mT + EYE


def unit(h: Tensor) -> Tensor:
    """Between 0.1 and 0.9."""
    return 0.1 + 0.8 * h.sigmoid()


def in_place(h: Tensor) -> Tensor:
    out = h * 2
    out[1:3, 0] = h[:2, 3].sin()
    return out.mul_(h.cos()).add_(1).clamp_(max=1.9)


def filled(h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out.copy_(h.sin())
    return out


def lu_solved(h: Tensor) -> Tensor:
    return torch.linalg.lu_solve(*torch.linalg.lu_factor(h + EYE), h.sin())


CONSTANT = {"by_autograd": True, "note": "what is detached is a constant, as in autograd"}
JUMPS = {"limits": {"`darts`": "not exact"}, "note": "samples jump, so differences are inaccurate"}
MORE = {
    "gumbel_softmax (hard)": CONSTANT,
    **dict.fromkeys(("Gamma.rsample", "Beta.rsample", "Dirichlet.rsample"), JUMPS),
}
FAMILIES: dict[str, dict[str, Any]] = {
    "torch.linalg": {
        "inv": lambda h: torch.linalg.inv(h + EYE),
        "solve": lambda h: torch.linalg.solve(h + EYE, h.sin()),
        "det": torch.linalg.det,
        "slogdet": lambda h: torch.linalg.slogdet(h)[1],
        "cholesky": lambda h: torch.linalg.cholesky(definite(h)),
        "cholesky_solve": lambda h: torch.cholesky_solve(h.sin(), torch.linalg.cholesky(definite(h))),
        "solve_triangular": lambda h: torch.linalg.solve_triangular(h + EYE, h.sin(), upper=True),
        "lu_factor, lu_solve": lu_solved,
        "qr": lambda h: torch.linalg.qr(h + EYE).R,
        "svd": lambda h: (lambda u, s, v: u.abs() * s + v.abs())(*torch.linalg.svd(h)),
        "svdvals": torch.linalg.svdvals,
        "eigh": lambda h: (lambda values, vectors: values + vectors.square())(*torch.linalg.eigh(definite(h))),
        "eigvalsh": lambda h: torch.linalg.eigvalsh(h + h.mT),
        "eig": lambda h: torch.linalg.eig(h).eigenvalues.abs(),
        "matrix_exp": torch.linalg.matrix_exp,
        "matrix_power": lambda h: torch.linalg.matrix_power(h, 3),
        "pinv": lambda h: torch.linalg.pinv(h[:, :2] + EYE[:, :2]),
        "lstsq": lambda h: torch.linalg.lstsq(h[:, :2] + EYE[:, :2], h[:, 2:]).solution,
        "norm": torch.linalg.norm,
        "norm (nuclear)": lambda h: torch.linalg.matrix_norm(h, "nuc"),
        "norm (spectral)": lambda h: torch.linalg.matrix_norm(h, 2),
        "vector_norm": lambda h: torch.linalg.vector_norm(h, 3, dim=1),
        "cond": lambda h: torch.linalg.cond(h + EYE),
        "cross": lambda h: torch.linalg.cross(h[:, :3], h[:, 1:]),
        "multi_dot": lambda h: torch.linalg.multi_dot([h, h.sin(), h.cos()]),
        "householder_product": lambda h: torch.linalg.householder_product(h.tril(-1), unit(h[0])),
    },
    "torch.fft": {
        "fft, ifft": lambda h: torch.fft.ifft(torch.fft.fft(h) * torch.arange(4)),
        "fft2": lambda h: torch.fft.fft2(h).abs(),
        "rfft, irfft": lambda h: torch.fft.irfft(torch.fft.rfft(h) ** 2),
        "hfft": lambda h: torch.fft.hfft(h),
        "fftshift": torch.fft.fftshift,
        "stft, istft": lambda h: torch.istft(
            torch.stft(h.view(1, 16), 4, window=torch.ones(4), return_complex=True) ** 2, 4, window=torch.ones(4)
        ),
    },
    "Products and sums of products": {
        "einsum": lambda h: torch.einsum("ij,kj,kl->il", h, h.sin(), h.cos()),
        "matmul, bmm": lambda h: torch.bmm(h.view(2, 2, 4), h.view(2, 4, 2)) @ h.view(2, 2, 4),
        "baddbmm, addmm": lambda h: torch.addmm(h, h.sin(), h, beta=0.5),
        "tensordot": lambda h: torch.tensordot(h.view(2, 2, 4), h, dims=([2], [0])),
        "kron, outer": lambda h: torch.kron(h[:2], h[2:]) + torch.outer(h[0], h[1]).sum(),
        "cdist": lambda h: torch.cdist(h[:2], h[2:]),
        "pdist": F.pdist,
        "F.bilinear": lambda h: F.bilinear(h, h.sin(), h.view(1, 4, 4).expand(2, 4, 4)),
        "F.conv2d of a computed kernel": lambda h: F.conv2d(h.view(1, 1, 4, 4), h[:2, :2].sin().view(1, 1, 2, 2)),
        "F.normalize, F.cosine_similarity": lambda h: F.normalize(h) * F.cosine_similarity(h, h.sin())[:, None],
    },
    "Indexing, gathering and scattering": {
        "indexing": lambda h: h[INDEX] * h[:, INDEX].mT + h[1:4, ::2].sum(),
        "gather": lambda h: h.gather(1, ROWS),
        "take, take_along_dim": lambda h: h.take(ROWS) + h.take_along_dim(ROWS, 0),
        "index_select": lambda h: h.index_select(0, INDEX),
        "index_add, index_copy, index_fill": lambda h: (
            h.index_add(0, INDEX, h[:3].sin()).index_copy(0, INDEX[:2], h[2:].cos()).index_fill(1, INDEX[:1], 0.5)
        ),
        "index_put (accumulate)": lambda h: h.index_put((INDEX,), h[:3].sin(), accumulate=True),
        "index_reduce": lambda h: h.index_reduce(0, INDEX, h[:3].exp(), "mean"),
        "scatter": lambda h: h.scatter(1, ROWS[:, 1:3], h[:, :2].sin()),
        "scatter_add": lambda h: h.scatter_add(1, ROWS, h.sin()),
        "scatter_reduce (sum)": lambda h: h.scatter_reduce(1, ROWS, h.sin(), "sum"),
        "scatter_reduce (mean)": lambda h: h.scatter_reduce(1, ROWS, h.sin(), "mean"),
        "scatter_reduce (amax)": lambda h: h.scatter_reduce(1, ROWS, h.sin(), "amax"),
        "scatter_reduce (prod)": lambda h: h.scatter_reduce(1, ROWS, h.exp(), "prod"),
        "segment_reduce": lambda h: torch.segment_reduce(h, "sum", lengths=torch.tensor([1, 3])),
        "masked_select, boolean masks": lambda h: h[h > 0].sum() * h.masked_select(h < 0.5).square().sum(),
        "masked_fill, masked_scatter, where": lambda h: torch.where(
            h > 0, h.masked_fill(h > 0.5, 2.0), h.masked_scatter(h > 0, h.sin())
        ),
        "roll, flip, rot90": lambda h: h.roll(1, 0) * h.flip(1) + torch.rot90(h),
        "unfold, as_strided": lambda h: h.unfold(1, 2, 1).prod(-1).sum() * h.as_strided((2, 3), (4, 1)),
        "diag, tril, trace": lambda h: h.diag().sum() * h.tril() + h.diag_embed().sum(0) * torch.trace(h),
        "cat, stack, split, repeat": lambda h: torch.stack(torch.cat([h, h.sin()]).split(4)).prod(0).repeat(2, 1),
        "in-place operators and slices": in_place,
        "copies into new tensors": filled,
    },
    "Cumulative operators, sorting and selecting": {
        "cumsum": lambda h: h.cumsum(1),
        "cumprod": lambda h: h.cumprod(1),
        "prod": lambda h: h.prod(1),
        "logcumsumexp": lambda h: h.logcumsumexp(1),
        "logsumexp": lambda h: h.logsumexp(1),
        "cummax": lambda h: h.cummax(1).values,
        "diff, gradient, trapezoid": lambda h: h.diff() * torch.trapezoid(h)[:, None] + torch.gradient(h)[0][:, 1:],
        "sort": lambda h: h.sort().values * torch.arange(4),
        "topk": lambda h: h.topk(2).values,
        "kthvalue, median, quantile": lambda h: h.kthvalue(2).values + h.median() + h.quantile(0.3),
        "max, min, amax": lambda h: h.max(1).values * h.min(0).values + h.amax() + torch.maximum(h, h.mT).sum(),
        "argsort as an index": lambda h: h.gather(1, h.argsort(1)),
        "var, std": lambda h: h.var(1) + h.std(0),
        "addcmul, lerp": lambda h: torch.addcmul(h.sin(), h.mean(0), h.var(0)).lerp(h, 0.3),
        "clamp, round, floor, sign": lambda h: h.clamp(-0.5, 0.5) * (h.round() + h.floor() + h.sign() + 0.5),
        "renorm": lambda h: h.renorm(2, 0, 1.0),
    },
    "Special functions": {
        "erf, erfc, erfinv": lambda h: torch.erf(h) + torch.erfc(h.sin()) * torch.erfinv(unit(h)),
        "lgamma": lambda h: torch.lgamma(h.exp()),
        "digamma, polygamma": lambda h: torch.digamma(h.exp()) + torch.polygamma(1, h.exp()),
        "multigammaln": lambda h: torch.special.multigammaln(3 + h.exp(), 2),
        "i0, i0e, i1, i1e": lambda h: (
            torch.special.i0(h) + torch.i0(h.sin()) + torch.special.i1(h) + torch.special.i1e(h) + torch.special.i0e(h)
        ),
        "xlogy, xlog1py, entr": lambda h: (
            torch.xlogy(h, h.exp()) + torch.special.xlog1py(h, h.exp()) + torch.special.entr(h.exp())
        ),
        "logit, expit, log_ndtr, ndtri": lambda h: (
            torch.logit(unit(h)) + torch.special.log_ndtr(h) + torch.special.ndtri(unit(h))
        ),
        "sinc": lambda h: torch.sinc(h),
        "erfcx": lambda h: torch.special.erfcx(h),
        "zeta": lambda h: torch.special.zeta(torch.full_like(h, 2.0), 1 + h.exp()),
        "bessel_j0": lambda h: torch.special.bessel_j0(h),
        "igamma": lambda h: torch.igamma(torch.full_like(h, 2.0), h.exp()),
        "pow, hypot, atan2, logaddexp": lambda h: (
            h.exp() ** h + torch.hypot(h, h.cos()) + torch.atan2(h, h.cos()) + torch.logaddexp(h, h.sin())
        ),
    },
    "Complex numbers": {
        "complex, polar, abs, angle": lambda h: torch.complex(h, h.sin()).angle() * torch.polar(h.exp(), h.cos()).abs(),
        "view_as_complex, conj, real, imag": lambda h: (lambda z: z.conj().real * z.imag)(
            torch.view_as_complex(h.view(4, 2, 2)).exp()
        ),
        "complex matrix product and solve": lambda h: torch.linalg.solve(
            torch.complex(h, h.sin()) + EYE, torch.complex(h.cos(), h)
        ),
    },
    "Sampling": {
        "Normal.rsample": lambda h: Normal(h, h.exp()).rsample(),
        "MultivariateNormal.rsample": lambda h: MultivariateNormal(h[0], definite(h)).rsample(),
        "Gamma.rsample": lambda h: Gamma(h.exp(), h.exp()).rsample(),
        "Beta.rsample": lambda h: Beta(h.exp(), h.cos().exp()).rsample(),
        "Dirichlet.rsample": lambda h: Dirichlet(h.exp()).rsample(),
        "StudentT.rsample": lambda h: StudentT(3.0, h, h.exp()).rsample(),
        "kl_divergence": lambda h: (
            kl_divergence(Normal(h, unit(h)), Normal(h.sin(), 1.0))
            + kl_divergence(Beta(unit(h), 1.0), Beta(2.0, unit(h)))
        ),
        "gumbel_softmax": lambda h: F.gumbel_softmax(h),
        "gumbel_softmax (hard)": lambda h: F.gumbel_softmax(h, hard=True),
    },
    "Resampling and geometry": {
        "interpolate (area)": lambda h: F.interpolate(h.view(1, 1, 4, 4), scale_factor=0.5, mode="area"),
        "interpolate (antialias)": lambda h: F.interpolate(h.view(1, 1, 4, 4), 3, mode="bilinear", antialias=True),
        "affine_grid": lambda h: F.affine_grid(h[:, :3].reshape(2, 2, 3), [2, 1, 2, 2], align_corners=False),
        "grid_sample": lambda h: F.grid_sample(h.view(1, 1, 4, 4), h.view(1, 4, 2, 2).tanh() * 0.7, align_corners=True),
        "grid_sample (bicubic)": lambda h: F.grid_sample(
            h.view(1, 1, 4, 4), h.view(1, 4, 2, 2).tanh() * 0.7, mode="bicubic", align_corners=True
        ),
    },
    "Sparse matrices": {
        "torch.sparse.mm, sparse times dense": lambda h: torch.sparse.mm(torch.eye(4, dtype=h.dtype).to_sparse(), h),
        "sparse CSR times dense": lambda h: torch.eye(4, dtype=h.dtype).to_sparse_csr() @ h,
        "computed values of a sparse matrix": lambda h: torch.sparse.mm(
            torch.sparse_coo_tensor(ROWS[:2], h[0], (4, 4), check_invariants=False), h
        ),
    },
}
CASES: list[Case] = [
    case
    for family, members in FAMILIES.items()
    for case in cases(family, {name: of(op) | MORE.get(name, {}) for name, op in members.items()})
]
