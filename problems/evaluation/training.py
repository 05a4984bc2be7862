"""The evaluation phase: train an architecture's network from scratch, and measure its error and size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, StepLR

import mlo
from mlo import ConfigError
from mlo.levels.transfers import to_device
from problems.data.images import Part
from problems.data.splits import Splits
from problems.evaluation.options import Training
from problems.nas import EvaluationNetwork, Genotype, size_of, stem_for
from problems.search.levels import AUTOCASTS


def check_images(training: Training, splits: Splits) -> None:
    """Raise a ConfigError if the images are too small for the auxiliary head."""
    smallest = 32 if stem_for(splits.image_size) == "cifar" else 224
    if training.auxiliary and splits.image_size < smallest:
        raise ConfigError(
            f"auxiliary: the head needs images of at least {smallest}x{smallest} pixels, but these are "
            f"{splits.image_size} high; leave it out, or set a larger data.image_size"
        )


def network(training: Training, genotype: Genotype, splits: Splits) -> EvaluationNetwork:
    """The network of a genotype."""
    stem = stem_for(splits.image_size)
    sizes = (training.channels, training.cells, splits.classes, splits.image_channels)
    return EvaluationNetwork(genotype, *sizes, training.auxiliary, stem)


def training_engine(
    training: Training, genotype: Genotype, splits: Splits, part: Part, steps: int, device: str, capture: bool = False
) -> mlo.Engine:
    """The engine that trains a genotype's network for `steps` steps on a part of the data."""
    module = network(training, genotype, splits)
    optimizer = SGD(module.parameters(), lr=training.learning_rate, momentum=0.9, weight_decay=training.weight_decay)
    problem = TrainNetwork(
        "network",
        module=module,
        optimizer=optimizer,
        scheduler=_scheduler(training, optimizer, steps, max(1, len(part) // training.batch_size)),
        data=part.batches(training.batch_size, training.augmentation),
        clip_norm=5.0,
        autocast=AUTOCASTS[training.precision],
        total_steps=steps,
        drop_path=training.drop_path,
        label_smoothing=training.label_smoothing,
    )
    return mlo.Engine([problem], tf32=training.tf32, capture=capture, device=device)


def _scheduler(training: Training, optimizer: SGD, steps: int, epoch: int) -> LRScheduler:
    if training.schedule == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    if training.schedule == "exponential":
        return StepLR(optimizer, epoch, gamma=0.97)
    return LambdaLR(optimizer, lambda step: linear_with_warmup(step, steps, epoch))


def judge(engine: mlo.Engine, splits: Splits, part: Part | None = None) -> dict[str, Any]:
    """The results of a trained network: errors in percent on a part (by default, the test images), and size.

    "multiply_adds" is for one image; "parameters" leaves out the auxiliary head.
    """
    trained = engine.problems["network"].module
    assert isinstance(trained, EvaluationNetwork)
    part = splits.test if part is None else part
    size = splits.image_size
    parameters, multiply_adds = size_of(trained, (splits.image_channels, size, size))
    return {
        **errors(trained, part, (1, 5) if splits.classes > 10 else (1,)),
        "test_images": len(part),
        "parameters": parameters,
        "multiply_adds": multiply_adds,
    }


def linear_with_warmup(step: int, steps: int, epoch: int, warm_epochs: int = 5) -> float:
    """The factor of the learning rate after `step` of `steps` steps; an epoch has `epoch` steps.

    It rises for 5 epochs, then falls linearly, and more slowly at the end. With E epochs in all and e of them done, it
    is (e + 1)/5 in the first five epochs, then (E - 5 - e)/(E - 5), and in the last five (E - e)/(5 (E - 5)). This is
    the ImageNet schedule of Chen et al. 2019 and Xu et al. 2020, as in their code. If there are fewer than 15 epochs,
    the steps are mapped to 15.
    """
    epochs = max(15.0, steps / epoch)
    done = float(int(step / steps * epochs + 1e-9))
    if done < warm_epochs:
        return (done + 1) / warm_epochs
    if epochs - done > warm_epochs:
        return (epochs - warm_epochs - done) / (epochs - warm_epochs)
    return max(0.0, epochs - done) / ((epochs - warm_epochs) * warm_epochs)


class TrainNetwork(mlo.Problem):
    """Trains an evaluation network with the cross-entropy; a batch is (images, labels).

    Args:
        total_steps: number of steps; the probability of drop-path grows over them (DARTS, section 3.2).
        drop_path: probability of drop-path at the end.
        auxiliary_weight: weight of the auxiliary head's loss.
        label_smoothing: the fraction of the target that is spread over all classes.
        **problem: see :class:`mlo.Problem`.
    """

    def __init__(
        self,
        name: str,
        *,
        total_steps: int,
        drop_path: float = 0.0,
        auxiliary_weight: float = 0.4,
        label_smoothing: float = 0.0,
        **problem: Any,
    ) -> None:
        super().__init__(name, **problem)
        self.total_steps = total_steps
        self.drop_path = drop_path
        self.auxiliary_weight = auxiliary_weight
        self.label_smoothing = label_smoothing

    def loss(self, batch: Any) -> Tensor:
        """The training loss."""
        images, labels = batch
        drop_path = self.drop_path * self.steps_taken / self.total_steps if self.drop_path else None
        logits, auxiliary = self(images, drop_path=drop_path)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        if auxiliary is None:
            return loss
        return loss + self.auxiliary_weight * F.cross_entropy(auxiliary, labels, label_smoothing=self.label_smoothing)


@torch.no_grad()
def errors(network: EvaluationNetwork, part: Part, tops: tuple[int, ...] = (1,), size: int = 500) -> dict[str, float]:
    """{"test_error": percent of images whose label is not ranked first, "test_top5_error": ... not in the first five}.

    The network keeps its training or eval mode.
    """
    device = next(network.parameters()).device
    training = network.training
    network.eval()
    wrong = {top: torch.zeros((), dtype=torch.int64, device=device) for top in tops}
    for batch in part.in_order(size):
        images, labels = to_device(batch, device)
        ranked = network(images).logits.topk(max(tops), dim=1).indices
        hits = ranked == labels[:, None]
        for top in tops:
            wrong[top] += (~hits[:, :top].any(dim=1)).sum()
    network.train(training)
    names = {1: "test_error"} | {top: f"test_top{top}_error" for top in tops if top > 1}
    return {names[top]: 100 * int(number) / len(part) for top, number in wrong.items()}
