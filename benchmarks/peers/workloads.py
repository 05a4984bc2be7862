"""Synthetic, seeded data, and the networks and losses of the workloads, the same for every library."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.workloads_lbt import Batch, Teaching, teaching

RIDGE = 1.0  # L2 penalty: makes the lower Hessian of the reweighted MLP positive definite, as implicit methods need
RADIUS = 0.01  # radius of the central differences, as in DARTS


class SampleWeights(nn.Module):
    """A weight for each training sample."""

    reads_losses = False

    def __init__(self, count: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(0.5 * torch.randn(count))

    def forward(self) -> Tensor:
        """Return all weights, in (0, 1)."""
        return self.logits.sigmoid()


class WeightNet(nn.Module):
    """Meta-weight-net: maps the loss of a sample to its weight."""

    reads_losses = True

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())

    def forward(self, losses: Tensor) -> Tensor:
        """The weights of samples with these losses."""
        return self.layers(losses.unsqueeze(1)).squeeze(1)


@dataclass
class Bilevel:
    """A model is trained on weighted samples, and the weights on the loss of the model on clean samples.

    Attributes:
        steps: the number of steps of the model for one hypergradient.
        trains: whether a round continues from the last one and also takes a step of the weights (meta-weight-net).
            Otherwise a round is one hypergradient, always from the same start.
    """

    model: nn.Sequential
    weights: nn.Module
    lower: list[Batch]
    upper: list[Batch]
    steps: int
    lr: float
    momentum: float
    trains: bool
    upper_lr: float = 1e-3
    drawn: tuple[Tensor, ...] | None = None

    def lower_loss(
        self, model: Callable[..., Tensor], weigh: Callable[..., Tensor], parameters: Iterable[Tensor], batch: Batch
    ) -> Tensor:
        """The weighted loss with its L2 penalty. Nothing is detached, so differences and exact products agree."""
        images, labels = batch
        losses = F.cross_entropy(model(images), labels, reduction="none")
        weights = weigh(losses) if self.weights.reads_losses else weigh()
        ridge = torch.stack([p.square().sum() for p in parameters]).sum()
        return (weights * losses).mean() + 0.5 * RIDGE * ridge

    def direction(self, like: Iterable[Tensor]) -> tuple[Tensor, ...]:
        """A vector for curvature products, drawn in float32; the same at each call."""
        draw = torch.Generator().manual_seed(1)
        if self.drawn is None:
            self.drawn = tuple(torch.randn(p.shape, generator=draw).to(p) for p in like)
        return self.drawn

    def upper_loss(self, model: Callable[..., Tensor], batch: Batch) -> Tensor:
        """The loss on clean samples."""
        images, labels = batch
        return F.cross_entropy(model(images), labels)


class LanguageModel(nn.Module):
    """A GPT from a configuration of transformers, with random weights; maps tokens to logits.

    Its attention is written out ("eager"), since the fused one has no second derivative on the CPU.
    """

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, heads: int) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        chosen = {"vocab_size": vocabulary, "n_positions": length, "n_embd": width, "n_layer": layers, "n_head": heads}
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
        tokens = {"bos_token_id": 0, "eos_token_id": 0}
        self.gpt = GPT2LMHeadModel(GPT2Config(**chosen, **off, **tokens, attn_implementation="eager"))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next tokens."""
        return self.gpt(tokens).logits


@dataclass
class Language:
    """A language model is trained with AdamW on weighted sequences, and the weights on its loss on held-out ones.

    AdamW starts in the middle of a training: with random moments, after ten steps. In its first step the derivative
    would only be that of rounding, since the first step does not depend on the size of the gradient.

    Attributes:
        lower: batches of sequences, and which sequences they are.
        upper: batches of held-out sequences.
        moments: of the parameters, the running means of gradients and of their squares.
        steps, trains: see :class:`Bilevel`.
        damping: added to the Hessian in conjugate gradient; its eigenvalues reach from -60 to 50.
    """

    model: nn.Module
    weights: SampleWeights
    lower: list[Batch]
    upper: list[Tensor]
    moments: tuple[list[Tensor], list[Tensor]]
    steps: int
    trains: bool
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    taken: int = 10
    upper_lr: float = 1e-2
    damping: float = 100.0

    def lower_loss(self, model: Callable[..., Tensor], weigh: Callable[..., Tensor], batch: Batch) -> Tensor:
        """The mean over the sequences of their weighted losses."""
        tokens, index = batch
        return (weigh()[index] * _next_token_losses(model, tokens)).mean()

    def upper_loss(self, model: Callable[..., Tensor], batch: Tensor) -> Tensor:
        """The mean loss of the held-out sequences."""
        return _next_token_losses(model, batch).mean()

    def optimizer(self) -> torch.optim.AdamW:
        """AdamW over the model, with its moments."""
        parameters = list(self.model.parameters())
        made = torch.optim.AdamW(parameters, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)
        for parameter, mean, square in zip(parameters, *self.moments, strict=True):
            step = torch.tensor(float(self.taken))
            made.state[parameter] = {"step": step, "exp_avg": mean.clone(), "exp_avg_sq": square.clone()}
        return made


def _next_token_losses(model: Callable[..., Tensor], tokens: Tensor) -> Tensor:
    """The mean loss of each sequence."""
    logits = model(tokens)[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


Task = Bilevel | Language | Teaching

#: {workload: {size: arguments of :func:`_bilevel`}}
_SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "mwn": {
        "full": {"sizes": (784, 256, 10), "count": 100, "steps": 1, "batches": 10},
        "small": {"sizes": (12, 8, 4), "count": 10, "steps": 1, "batches": 3},
    },
    "clean512": {
        "full": {"sizes": (784, 256, 10), "count": 512, "steps": 20},
        "small": {"sizes": (12, 8, 4), "count": 16, "steps": 4},
    },
    "clean8192": {
        "full": {"sizes": (784, 256, 10), "count": 8192, "steps": 36},
        "small": {"sizes": (12, 8, 4), "count": 24, "steps": 6},
    },
    "tiny": {
        "full": {"sizes": (16, 16, 10), "count": 32, "steps": 20},
        "small": {"sizes": (6, 5, 3), "count": 8, "steps": 3},
    },
}

#: {workload: arguments of :func:`_language`}
_LANGUAGE: dict[str, dict[str, Any]] = {
    "gpt": {"steps": 1, "trains": True},
    "gpt4": {"steps": 4, "trains": False},
}
_LANGUAGE_SIZES: dict[str, dict[str, Any]] = {
    "full": {"model": (512, 128, 384, 6, 6), "size": 8, "batches": 8},
    "small": {"model": (11, 6, 8, 2, 2), "size": 2, "batches": 5},
}


def make(workload: str, size: str = "full", dtype: torch.dtype = torch.float32) -> Task:
    """Make a workload. ``size`` is "full", or "small" for tests; values are drawn in float32 and cast to ``dtype``."""
    torch.manual_seed(0)
    if workload in _LANGUAGE:
        return _language(**_LANGUAGE[workload], **_LANGUAGE_SIZES[size], dtype=dtype)
    if workload == "lbt":
        return teaching(*((16, 16, 32, 10, 5) if size == "full" else (4, 6, 5, 3, 2)), dtype=dtype)
    return _bilevel(**_SIZES[workload][size], trains=workload == "mwn", dtype=dtype)


def _bilevel(
    sizes: tuple[int, int, int], count: int, steps: int, trains: bool, dtype: torch.dtype, batches: int = 1
) -> Bilevel:
    inputs, hidden, classes = sizes
    model = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))
    weights = WeightNet() if trains else SampleWeights(count)
    truth = torch.randn(inputs, classes)

    def batch(size: int, flipped: float) -> Batch:
        images = torch.randn(size, inputs)
        labels = torch.where(torch.rand(size) < flipped, torch.randint(classes, (size,)), (images @ truth).argmax(1))
        return images.to(dtype), labels

    lower = [batch(count, 0.5) for _ in range(batches)]
    upper = [batch(min(count, 512), 0.0) for _ in range(batches)]
    momentum = 0.9 if trains else 0.0
    return Bilevel(model.to(dtype), weights.to(dtype), lower, upper, steps, 0.1, momentum, trains)


def _language(
    model: tuple[int, int, int, int, int], size: int, batches: int, steps: int, trains: bool, dtype: torch.dtype
) -> Language:
    vocabulary, length, *_ = model
    net, weights = LanguageModel(*model).to(dtype), SampleWeights(size * batches).to(dtype)
    means = [(1e-4 * torch.randn(p.shape)).to(dtype) for p in net.parameters()]
    squares = [(1e-6 * (0.5 + torch.rand(p.shape))).to(dtype) for p in net.parameters()]
    lower = [(torch.randint(vocabulary, (size, length)), index) for index in torch.arange(size * batches).split(size)]
    upper = [torch.randint(vocabulary, (size, length)) for _ in range(batches)]
    return Language(net, weights, lower, upper, (means, squares), steps, trains)
