"""Training an evaluation network, and its test error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mlo
from problems.images import ArrayPixels, Part
from problems.nas import PUBLISHED, EvaluationNetwork, Predictions
from problems.training import TrainNetwork
from problems.training import test_error as error_of


class Known(nn.Module):
    """Predicts the first pixel in evaluation, and nonsense in training."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, images: torch.Tensor) -> Predictions:
        classes = images[:, 0, 0, 0].long() if not self.training else torch.zeros(len(images), dtype=torch.long)
        return Predictions(F.one_hot(classes, 5).float(), None)


def test_the_error_is_the_percentage_of_wrong_answers_in_evaluation_mode():
    images = torch.arange(20.0).remainder(5).view(20, 1, 1, 1).expand(20, 1, 2, 2)
    labels = images[:, 0, 0, 0].long()
    labels[:3] = (labels[:3] + 1) % 5
    data = Part.of(ArrayPixels(images), labels)
    network = Known().train()
    assert error_of(network, data, batch_size=7) == pytest.approx(15.0)
    assert network.training
    assert error_of(network.eval(), data) == pytest.approx(15.0)
    assert not network.training


def train(**options: object) -> TrainNetwork:
    torch.manual_seed(0)
    auxiliary = options.pop("auxiliary", False)
    network = EvaluationNetwork(PUBLISHED["DARTS_V2"], 2, 3, image_channels=1, auxiliary=auxiliary)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    size = options.pop("size", 8)
    data = [(torch.randn(6, 1, size, size), torch.arange(6))]
    return TrainNetwork("network", module=network, optimizer=optimizer, data=data, total_steps=4, **options)


def test_the_probability_of_drop_path_grows_with_the_steps(monkeypatch):
    seen = []
    real = EvaluationNetwork.forward

    def watched(self, images, drop_path):
        seen.append(drop_path)
        return real(self, images, drop_path)

    monkeypatch.setattr(EvaluationNetwork, "forward", watched)
    mlo.Engine([train(drop_path=0.2)], device="cpu").run(4)
    assert seen == pytest.approx([0.0, 0.05, 0.1, 0.15])


def test_the_auxiliary_head_weighs_what_it_should():
    losses = []
    for weight in (0.0, 0.4, 0.8):
        problem = train(auxiliary=True, auxiliary_weight=weight, size=32)
        engine = mlo.Engine([problem], device="cpu")
        engine.step()
        losses.append(engine.losses["network"].item())
    assert losses[1] - losses[0] == pytest.approx(losses[2] - losses[1], rel=1e-4)
    assert losses[1] - losses[0] > 0.5
