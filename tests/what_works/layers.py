"""Layers, each between what it needs to be trained, with the options that change what runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from .case import Case, cases

Made = Callable[[], nn.Module]


class Words(nn.Module):
    """A layer that takes whole numbers; what follows depends on the scale of the batch."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(4, 2)

    def forward(self, words: Tensor, gain: Tensor) -> Tensor:
        return self.head(self.layer(words).tanh() * gain)


class First(nn.Module):
    """A layer that returns several things: the first."""

    def __init__(self, layer: nn.Module, call: Callable[..., Any] = lambda layer, x: layer(x)[0]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, *args: Any) -> Tensor:
        return self.call(self.layer, *args)


class Attending(nn.Module):
    """An operator of queries, keys and values."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.mix, self.attend = nn.Linear(4, 12), attend

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.mix(x)[:, None].chunk(3, dim=-1)
        return self.attend(query, key, value)


def numbers(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(shape),)


def words() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 6, (5, 3)), torch.randn(5, 1, 1).exp()


def bags() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 6, (5, 3)), torch.randn(5, 1).exp()


def alone(layer: Made, *shape: int) -> dict[str, Any]:
    """A layer with parameters of its own, on a batch of a shape."""
    return {"module": lambda: nn.Sequential(layer(), nn.Tanh()), "x": numbers(*shape)}


def after(layer: Made, *shape: int) -> dict[str, Any]:
    """A layer after a linear one."""
    return {"module": lambda: nn.Sequential(nn.Linear(shape[-1], shape[-1]), layer()), "x": numbers(*shape)}


def evaluating(layer: Made) -> Made:
    return lambda: layer().eval()


def first(layer: Made, *shape: int, **how: Any) -> dict[str, Any]:
    return {"module": lambda: First(layer(), **how), "x": numbers(*shape)}


def attending(attend: Callable[..., Tensor]) -> dict[str, Any]:
    return {"module": lambda: Attending(attend), "x": numbers(2, 3, 4)}


def normed(norm: Callable[..., Any], **options: Any) -> dict[str, Any]:
    return alone(lambda: norm(nn.Linear(3, 3), "weight", **options), 4, 3)


def unpooled(dimensions: int) -> dict[str, Any]:
    pool, unpool = (getattr(nn, f"{name}{dimensions}d") for name in ("MaxPool", "MaxUnpool"))

    def call(layer: nn.Module, x: Tensor) -> Tensor:
        return layer[2](*layer[1](layer[0](x)))

    shape = (2, 2, *[4] * dimensions)
    return first(lambda: nn.Sequential(nn.Linear(4, 4), pool(2, return_indices=True), unpool(2)), *shape, call=call)


LINEAR = {
    "Linear": alone(partial(nn.Linear, 3, 4), 5, 3),
    "Linear without bias": alone(partial(nn.Linear, 3, 4, bias=False), 5, 3),
    "Bilinear": {"module": lambda: nn.Bilinear(3, 2, 4), "x": lambda: (torch.randn(5, 3), torch.randn(5, 2))},
    "Conv1d": alone(partial(nn.Conv1d, 2, 3, 3), 2, 2, 6),
    "Conv2d": alone(partial(nn.Conv2d, 2, 3, 3, padding=1), 2, 2, 5, 5),
    "Conv3d": alone(partial(nn.Conv3d, 2, 2, 2), 2, 2, 3, 3, 3),
    "Conv2d depthwise": alone(partial(nn.Conv2d, 4, 4, 3, groups=4, bias=False), 2, 4, 5, 5),
    "Conv2d (dilated, strided)": alone(partial(nn.Conv2d, 2, 3, 3, stride=2, dilation=2), 2, 2, 7, 7),
    "Conv2d padding_mode": alone(partial(nn.Conv2d, 2, 3, 3, padding=1, padding_mode="circular"), 2, 2, 4, 4),
    "ConvTranspose1d": alone(partial(nn.ConvTranspose1d, 2, 3, 3), 2, 2, 5),
    "ConvTranspose2d": alone(partial(nn.ConvTranspose2d, 2, 3, 3, stride=2), 2, 2, 3, 3),
    "ConvTranspose3d": alone(partial(nn.ConvTranspose3d, 2, 2, 2), 2, 2, 2, 2, 2),
}
NORMS = {
    "BatchNorm1d": after(partial(nn.BatchNorm1d, 3), 6, 3),
    "BatchNorm2d": alone(partial(nn.BatchNorm2d, 2), 3, 2, 3, 3),
    "BatchNorm3d": alone(partial(nn.BatchNorm3d, 2), 2, 2, 2, 2, 2),
    "BatchNorm1d (eval)": after(evaluating(partial(nn.BatchNorm1d, 3)), 6, 3),
    "BatchNorm1d without running statistics": after(partial(nn.BatchNorm1d, 3, track_running_stats=False), 6, 3),
    "BatchNorm1d with momentum=None": after(partial(nn.BatchNorm1d, 3, momentum=None), 6, 3),
    "LayerNorm": after(partial(nn.LayerNorm, 4), 3, 4),
    "GroupNorm": alone(partial(nn.GroupNorm, 2, 4), 2, 4, 3),
    "InstanceNorm1d": alone(partial(nn.InstanceNorm1d, 2, affine=True), 2, 2, 5),
    "InstanceNorm2d": alone(partial(nn.InstanceNorm2d, 2, affine=True, track_running_stats=True), 2, 2, 3, 3),
    "InstanceNorm3d": alone(partial(nn.InstanceNorm3d, 2, affine=True), 2, 2, 2, 2, 2),
    "RMSNorm": after(partial(nn.RMSNorm, 4), 3, 4),
    "LocalResponseNorm": after(partial(nn.LocalResponseNorm, 2), 2, 3, 4),
    "CrossMapLRN2d": after(partial(nn.CrossMapLRN2d, 2), 2, 3, 4, 4),
}
RANDOM = {
    "Dropout": after(nn.Dropout, 6, 4),
    "Dropout (eval)": after(evaluating(nn.Dropout), 6, 4),
    "Dropout1d": after(nn.Dropout1d, 3, 4, 4),
    "Dropout2d": after(nn.Dropout2d, 3, 4, 2, 4),
    "Dropout3d": after(nn.Dropout3d, 3, 4, 2, 2, 4),
    "AlphaDropout": after(nn.AlphaDropout, 6, 4),
    "FeatureAlphaDropout": after(nn.FeatureAlphaDropout, 3, 4, 2, 2, 4),
    "RReLU": after(nn.RReLU, 6, 4),
    "FractionalMaxPool2d": after(partial(nn.FractionalMaxPool2d, 2, output_size=2), 2, 2, 5, 5),
    "FractionalMaxPool3d": after(partial(nn.FractionalMaxPool3d, 2, output_size=2), 1, 2, 4, 4, 4),
}
EMBEDDINGS = {
    "Embedding": {"module": lambda: Words(nn.Embedding(6, 4)), "x": words},
    "Embedding with padding_idx": {"module": lambda: Words(nn.Embedding(6, 4, padding_idx=0)), "x": words},
    "Embedding with scale_grad_by_freq": {
        "module": lambda: Words(nn.Embedding(6, 4, scale_grad_by_freq=True)),
        "x": words,
    },
    "Embedding with sparse=True": {"module": lambda: Words(nn.Embedding(6, 4, sparse=True)), "x": words},
    "Embedding with max_norm": {"module": lambda: Words(nn.Embedding(6, 4, max_norm=1.0)), "x": words},
    "EmbeddingBag (mean)": {"module": lambda: Words(nn.EmbeddingBag(6, 4)), "x": bags},
    "EmbeddingBag (sum)": {"module": lambda: Words(nn.EmbeddingBag(6, 4, mode="sum")), "x": bags},
    "EmbeddingBag (max)": {"module": lambda: Words(nn.EmbeddingBag(6, 4, mode="max")), "x": bags},
    "EmbeddingBag with sparse=True": {"module": lambda: Words(nn.EmbeddingBag(6, 4, sparse=True)), "x": bags},
}
RECURRENT = {
    "LSTM": first(partial(nn.LSTM, 3, 4, batch_first=True), 2, 3, 3),
    "LSTM with proj_size": first(partial(nn.LSTM, 3, 4, proj_size=2, bidirectional=True), 3, 2, 3),
    "GRU": first(partial(nn.GRU, 3, 4, num_layers=2), 3, 2, 3),
    "GRU with dropout": first(partial(nn.GRU, 3, 4, num_layers=2, dropout=0.4), 3, 2, 3),
    "RNN": first(partial(nn.RNN, 3, 4), 3, 2, 3),
    "RNN (relu)": first(partial(nn.RNN, 3, 4, nonlinearity="relu", bidirectional=True), 3, 2, 3),
    "LSTMCell": first(partial(nn.LSTMCell, 3, 4), 2, 3),
    "GRUCell": first(partial(nn.GRUCell, 3, 4), 2, 3, call=lambda layer, x: layer(x)),
    "RNNCell": first(partial(nn.RNNCell, 3, 4), 2, 3, call=lambda layer, x: layer(x)),
}
ATTENTION = {
    "MultiheadAttention": first(partial(nn.MultiheadAttention, 4, 2), 3, 2, 4, call=lambda layer, x: layer(x, x, x)[0]),
    "MultiheadAttention without weights": first(
        partial(nn.MultiheadAttention, 4, 2, batch_first=True, dropout=0.2),
        *(2, 3, 4),
        call=lambda layer, x: layer(x, x, x, need_weights=False)[0],
    ),
    "MultiheadAttention with masks": first(
        partial(nn.MultiheadAttention, 4, 2, batch_first=True, add_bias_kv=True),
        *(2, 3, 4),
        call=lambda layer, x: layer(x, x, x, key_padding_mask=torch.tensor([[False, False, True]] * 2))[0],
    ),
    "TransformerEncoderLayer": alone(partial(nn.TransformerEncoderLayer, 4, 2, 5, dropout=0.1), 3, 2, 4),
    "TransformerEncoderLayer (eval)": alone(
        evaluating(partial(nn.TransformerEncoderLayer, 4, 2, 5, batch_first=True)), 3, 2, 4
    ),
    "TransformerEncoder": alone(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 5, activation="gelu", norm_first=True), 2, None),
        *(3, 2, 4),
    ),
    "TransformerDecoderLayer": first(
        partial(nn.TransformerDecoderLayer, 4, 2, 5, dropout=0.0), 3, 2, 4, call=lambda layer, x: layer(x, x.cos())
    ),
    "TransformerDecoder": first(
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 5), 1), 3, 2, 4, call=lambda m, x: m(x, x.cos())
    ),
    "Transformer": first(
        partial(nn.Transformer, 4, 2, 1, 1, 5, dropout=0.0), 3, 2, 4, call=lambda layer, x: layer(x, x.cos())
    ),
    "scaled_dot_product_attention": attending(F.scaled_dot_product_attention),
    "scaled_dot_product_attention (causal)": attending(partial(F.scaled_dot_product_attention, is_causal=True)),
    "scaled_dot_product_attention (dropout)": attending(partial(F.scaled_dot_product_attention, dropout_p=0.3)),
    "scaled_dot_product_attention (mask)": attending(
        partial(F.scaled_dot_product_attention, attn_mask=torch.ones(3, 3, dtype=torch.bool).tril())
    ),
}
ACTIVATIONS = {
    **{
        name: after(getattr(nn, name), 5, 4)
        for name in (
            *("CELU", "ELU", "GELU", "GLU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "Identity"),
            *("LeakyReLU", "LogSigmoid", "Mish", "PReLU", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softplus"),
            *("Softshrink", "Softsign", "Tanh", "Tanhshrink"),
        )
    },
    "GELU (tanh)": after(partial(nn.GELU, approximate="tanh"), 5, 4),
    "Threshold": after(partial(nn.Threshold, 0.1, 0.5), 5, 4),
    "Softmax": after(partial(nn.Softmax, dim=-1), 5, 4),
    "LogSoftmax": after(partial(nn.LogSoftmax, dim=-1), 5, 4),
    "Softmin": after(partial(nn.Softmin, dim=-1), 5, 4),
    "Softmax2d": after(nn.Softmax2d, 2, 3, 2, 4),
    "ReLU (inplace)": after(partial(nn.ReLU, inplace=True), 5, 4),
    "SiLU (inplace)": after(partial(nn.SiLU, inplace=True), 5, 4),
}
SHAPES = {
    **{
        f"{kind}Pool{n}d": after(partial(getattr(nn, f"{kind}Pool{n}d"), 2), 2, 2, *[4] * n)
        for kind in ("Avg", "Max")
        for n in (1, 2, 3)
    },
    **{
        f"Adaptive{kind}Pool{n}d": after(partial(getattr(nn, f"Adaptive{kind}Pool{n}d"), 2), 2, 2, *[3] * n)
        for kind in ("Avg", "Max")
        for n in (1, 2, 3)
    },
    **{f"LPPool{n}d": after(partial(getattr(nn, f"LPPool{n}d"), 2, 2), 2, 2, *[4] * n) for n in (1, 2, 3)},
    **{f"MaxUnpool{n}d": unpooled(n) for n in (1, 2, 3)},
    **{
        f"{kind}Pad{n}d": after(partial(getattr(nn, f"{kind}Pad{n}d"), 1), 2, 2, *[3] * n)
        for kind in ("Circular", "Reflection", "Replication", "Zero")
        for n in (1, 2, 3)
    },
    **{f"ConstantPad{n}d": after(partial(getattr(nn, f"ConstantPad{n}d"), 1, 0.5), 2, 2, *[3] * n) for n in (1, 2, 3)},
    **{
        f"Upsample ({mode})": after(partial(nn.Upsample, scale_factor=2, mode=mode), 2, 2, *[3] * n)
        for mode, n in (("nearest", 2), ("linear", 1), ("bilinear", 2), ("bicubic", 2), ("trilinear", 3))
    },
    "UpsamplingNearest2d": after(partial(nn.UpsamplingNearest2d, scale_factor=2), 2, 2, 3, 3),
    "UpsamplingBilinear2d": after(partial(nn.UpsamplingBilinear2d, scale_factor=2), 2, 2, 3, 3),
    "PixelShuffle": after(partial(nn.PixelShuffle, 2), 2, 4, 2, 2),
    "PixelUnshuffle": after(partial(nn.PixelUnshuffle, 2), 2, 2, 4, 4),
    "ChannelShuffle": after(partial(nn.ChannelShuffle, 2), 2, 4, 2, 2),
    "Fold": after(partial(nn.Fold, 3, 2), 2, 8, 4),
    "Unfold": after(partial(nn.Unfold, 2), 2, 2, 3, 3),
    "Flatten": after(nn.Flatten, 2, 2, 3),
    "Unflatten": after(partial(nn.Unflatten, 1, (2, 2)), 3, 4),
    "CosineSimilarity": first(
        lambda: nn.ModuleList([nn.Linear(3, 3), nn.CosineSimilarity()]), 4, 3, call=lambda m, x: m[1](m[0](x), x.cos())
    ),
    "PairwiseDistance": first(
        lambda: nn.ModuleList([nn.Linear(3, 3), nn.PairwiseDistance()]), 4, 3, call=lambda m, x: m[1](m[0](x), x.cos())
    ),
}
REPARAMETRIZED = {
    "parametrizations.weight_norm": normed(parametrizations.weight_norm),
    "utils.weight_norm": normed(nn.utils.weight_norm),
    "parametrizations.spectral_norm (eval)": normed(lambda *a: parametrizations.spectral_norm(*a).eval()),
    "parametrizations.spectral_norm": normed(parametrizations.spectral_norm)
    | {"tolerance": 0.02, "word": "approximate", "note": "its vectors are constants, as in autograd"},
    "utils.spectral_norm (eval)": normed(lambda *a: nn.utils.spectral_norm(*a).eval()),
    "parametrizations.orthogonal (matrix_exp)": normed(parametrizations.orthogonal, orthogonal_map="matrix_exp"),
    "parametrizations.orthogonal (cayley)": normed(parametrizations.orthogonal, orthogonal_map="cayley"),
    "parametrizations.orthogonal (householder)": normed(parametrizations.orthogonal, orthogonal_map="householder"),
    "prune.l1_unstructured": normed(prune.l1_unstructured, amount=0.4),
    "prune.random_structured": normed(prune.random_structured, amount=1, dim=0),
}

CASES: list[Case] = [
    case
    for family, members in {
        "Linear and convolutional layers": LINEAR,
        "Normalization": NORMS,
        "Dropout and other random layers": RANDOM,
        "Embeddings": EMBEDDINGS,
        "Recurrent layers": RECURRENT,
        "Attention": ATTENTION,
        "Activations": ACTIVATIONS,
        "Pooling, padding, resampling and shapes": SHAPES,
        "Parametrizations and pruning": REPARAMETRIZED,
    }.items()
    for case in cases(family, members)
]
