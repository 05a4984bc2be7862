"""Training one image classifier from scratch, as architectures are judged, and its test error."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mlo
from problems.images import Part
from problems.nas import EvaluationNetwork


class TrainNetwork(mlo.Problem):
    """An evaluation network trained by cross-entropy; a batch is (images, labels).

    Args:
        total_steps: steps in all; the probability of drop-path grows to ``drop_path`` over them (DARTS, section 3.2).
        drop_path: its last probability.
        auxiliary_weight: weight of the auxiliary head's loss.
        **problem: see :class:`mlo.Problem`.
    """

    def __init__(
        self, name: str, *, total_steps: int, drop_path: float = 0.0, auxiliary_weight: float = 0.4, **problem: Any
    ) -> None:
        super().__init__(name, **problem)
        self.total_steps = total_steps
        self.drop_path = drop_path
        self.auxiliary_weight = auxiliary_weight

    def loss(self, batch: Any) -> Tensor:
        """The training loss."""
        images, labels = batch
        logits, auxiliary = self(images, drop_path=self.drop_path * self.steps_taken / self.total_steps)
        loss = F.cross_entropy(logits, labels)
        return loss if auxiliary is None else loss + self.auxiliary_weight * F.cross_entropy(auxiliary, labels)


@torch.no_grad()
def test_error(network: EvaluationNetwork, data: Part, batch_size: int = 500) -> float:
    """The part of ``data`` that the network gets wrong, in percent; the network is left in the mode that it was in."""
    device = next(network.parameters()).device
    training = network.training
    network.eval()
    wrong = 0
    for images, labels in data.in_order(batch_size):
        predicted = network(images.to(device)).logits.argmax(dim=1)
        wrong += int((predicted != labels.to(device)).sum())
    network.train(training)
    return 100 * wrong / len(data)
