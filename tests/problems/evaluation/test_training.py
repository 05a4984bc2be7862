"""Training an evaluation network, and its test error."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mlo
from mlo import ConfigError
from problems.data.images import ArrayPixels, Part
from problems.data.options import Data
from problems.evaluation.options import Training
from problems.evaluation.training import TrainNetwork, check_images, errors, linear_with_warmup, training_engine
from problems.nas import PUBLISHED, EvaluationNetwork, Predictions


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
    assert errors(network, data, size=7) == {"test_error": pytest.approx(15.0)}
    assert network.training
    assert errors(network.eval(), data)["test_error"] == pytest.approx(15.0)
    assert not network.training


def test_the_top_5_error_counts_labels_that_are_not_among_the_5():
    class Ranks(Known):
        def forward(self, images: torch.Tensor) -> Predictions:
            return Predictions(-torch.arange(12.0).expand(len(images), 12), None)  # class 0 first, class 11 last

    data = Part.of(ArrayPixels(torch.zeros(12, 1, 2, 2)), torch.arange(12))
    found = errors(Ranks(), data, (1, 5))
    assert found == {"test_error": pytest.approx(100 * 11 / 12), "test_top5_error": pytest.approx(100 * 7 / 12)}


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


def test_the_linear_schedule_is_the_one_of_p_darts_on_imagenet():
    # 250 epochs of 10 steps: up over 5, then (E - 5 - e)/(E - 5), the last five (E - e)/(5 (E - 5))
    def at(epoch: int) -> float:
        return linear_with_warmup(10 * epoch, 2500, 10)

    assert [at(e) for e in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert at(5) == pytest.approx(240 / 245)
    assert at(244) == pytest.approx(1 / 245)
    assert [at(e) for e in (245, 249)] == pytest.approx([5 / (5 * 245), 1 / (5 * 245)])


@pytest.mark.parametrize(
    ("schedule", "after_an_epoch"), [("cosine", 0.5 * (1 + math.cos(math.pi / 4))), ("exponential", 0.97)]
)
def test_schedules_go_by_epochs(schedule, after_an_epoch):
    splits = Data(train_size=40, validation_size=40, unlabeled_size=40).splits(seed=0)
    options = Training(schedule=schedule, batch_size=10, channels=2, cells=1, label_smoothing=0.1, weight_decay=3e-5)
    engine = training_engine(options, PUBLISHED["DARTS_V2"], splits, splits.labeled, 32, "cpu")  # 8 steps an epoch
    problem = engine.problems["network"]
    assert problem.label_smoothing == 0.1
    assert problem.optimizer.param_groups[0]["weight_decay"] == 3e-5
    engine.run(8)
    assert problem.optimizer.param_groups[0]["lr"] == pytest.approx(options.learning_rate * after_an_epoch)


def test_labels_are_smoothed_and_a_small_image_has_no_auxiliary_head():
    smooth, plain = (train(label_smoothing=value) for value in (0.3, 0.0))
    for problem in (smooth, plain):
        mlo.Engine([problem], device="cpu")
    batch = next(iter(smooth.stream.peek() for _ in "1"))
    logits = smooth.module(batch[0]).logits
    expected = F.cross_entropy(logits, batch[1], label_smoothing=0.3)
    assert smooth.loss(batch).item() == pytest.approx(expected.item(), rel=1e-3)
    splits = Data(train_size=40, validation_size=40, unlabeled_size=40).splits(seed=0)
    with pytest.raises(ConfigError, match="the head needs images of at least 32x32 pixels, but these are 8 high"):
        check_images(Training(auxiliary=True), splits)
