"""The losses of torch.nn, of the outputs of a linear layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .case import Case, cases, grid

CLASSES = torch.tensor([0, 2, 1, 3, 0])
SIGNS = torch.tensor([1, -1, 1, 1, -1])


def of(loss: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A loss of the outputs, of shape (5, 4)."""
    return {
        "module": partial(nn.Linear, 3, 4),
        "x": lambda: (torch.randn(5, 3),),
        "fit": lambda model, s, x: loss(s[0] * model(x[0] * s[1])),
    }


def near(loss: nn.Module) -> dict[str, Any]:
    """A loss of the outputs and a target of the same shape."""
    return of(lambda h: loss(h, grid(5, 4).double()))


def right(loss: nn.Module) -> dict[str, Any]:
    """A loss of the outputs and the right classes."""
    return of(lambda h: loss(h, CLASSES))


def among(loss: nn.Module) -> dict[str, Any]:
    """A loss of log-probabilities or probabilities."""
    return of(lambda h: loss(h.log_softmax(-1), grid(5, 4).double().softmax(-1)))


class Ending(nn.Module):
    """A linear layer and a loss with parameters of its own."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.layer, self.loss = nn.Linear(3, 4), loss

    def forward(self, x: Tensor) -> Tensor:
        found = self.loss(self.layer(x).tanh(), CLASSES)
        return found if isinstance(found, Tensor) else found.loss


def ending(loss: Callable[[], nn.Module]) -> dict[str, Any]:
    return {
        "module": lambda: Ending(loss()),
        "x": lambda: (torch.randn(5, 3),),
        "fit": lambda model, s, x: s[0] * model(x[0] * s[1]),
    }


ctc = nn.CTCLoss()
LOSSES = {
    "L1Loss": near(nn.L1Loss()),
    "MSELoss": near(nn.MSELoss()),
    "SmoothL1Loss": near(nn.SmoothL1Loss()),
    "HuberLoss": near(nn.HuberLoss()),
    "CrossEntropyLoss": right(nn.CrossEntropyLoss()),
    "CrossEntropyLoss with weight and ignore_index": right(
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3, 4]).double(), ignore_index=3)
    ),
    "CrossEntropyLoss with label_smoothing": right(nn.CrossEntropyLoss(label_smoothing=0.1)),
    "CrossEntropyLoss of probabilities": of(
        lambda h: nn.functional.cross_entropy(h, grid(5, 4).double().softmax(-1), label_smoothing=0.1)
    ),
    "NLLLoss": of(lambda h: nn.NLLLoss()(h.log_softmax(-1), CLASSES)),
    "PoissonNLLLoss": of(lambda h: nn.PoissonNLLLoss()(h, CLASSES[:, None].double())),
    "GaussianNLLLoss": of(lambda h: nn.GaussianNLLLoss()(h[:, :2], grid(5, 2).double(), h[:, 2:].exp())),
    "KLDivLoss": among(nn.KLDivLoss(reduction="batchmean")),
    "BCELoss": of(lambda h: nn.BCELoss()(h.sigmoid(), grid(5, 4).double().sigmoid())),
    "BCEWithLogitsLoss": of(
        lambda h: nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0))(h, grid(5, 4).double().sigmoid())
    ),
    "SoftMarginLoss": of(lambda h: nn.SoftMarginLoss()(h[:, 0], SIGNS)),
    "MultiLabelSoftMarginLoss": of(lambda h: nn.MultiLabelSoftMarginLoss()(h, (grid(5, 4) > 0).double())),
    "MultiMarginLoss": right(nn.MultiMarginLoss(p=2)),
    "MultiLabelMarginLoss": of(lambda h: nn.MultiLabelMarginLoss()(h, torch.tensor([[1, 3, -1, 0]] * 5))),
    "HingeEmbeddingLoss": of(lambda h: nn.HingeEmbeddingLoss()(h[:, 0].square(), SIGNS)),
    "MarginRankingLoss": of(lambda h: nn.MarginRankingLoss(0.5)(h[:, 0].sin(), h[:, 1].sin(), SIGNS)),
    "CosineEmbeddingLoss": of(lambda h: nn.CosineEmbeddingLoss(-0.5)(h[:, :2], h[:, 2:], SIGNS)),
    "TripletMarginLoss": of(lambda h: nn.TripletMarginLoss(5.0)(h, h.cos(), h.sin())),
    "TripletMarginWithDistanceLoss": of(lambda h: nn.TripletMarginWithDistanceLoss(margin=5.0)(h, h.cos(), h.sin())),
    "CTCLoss": of(
        lambda h: ctc(h[:, None].log_softmax(-1), torch.tensor([[1, 2]]), torch.tensor([5]), torch.tensor([2]))
    ),
    "AdaptiveLogSoftmaxWithLoss": ending(partial(nn.AdaptiveLogSoftmaxWithLoss, 4, 4, [1, 2])),
    "LinearCrossEntropyLoss": ending(partial(nn.LinearCrossEntropyLoss, 4, 4)),
}

CASES: list[Case] = cases("Losses", LOSSES)
