"""What each of two processes does for tests/mlo/training/test_distributed.py; its results go to a folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

import mlo
from mlo.cli.main import app
from mlo.ops import distributed
from mlo.training.commit import Updater

CPU = torch.device("cpu")
STEPS = 150
EVALUATION = ["run", "evaluate", "--genotype=DARTS_V2", "--device=cpu", "--threads=1", f"--steps={STEPS}"]
EVALUATION += ["--training.cells=1", "--training.channels=2", "--training.batch_size=20", "--training.drop_path=0.2"]
EVALUATION += ["--training.augmentation.flip=true", "--checkpoint_every=1000", "--log_every=1"]


class Classify(mlo.Problem):
    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self(x), y)


class Weighted(mlo.Problem):
    def loss(self, batch, weight):
        return F.cross_entropy(self(batch[0]), batch[1]) * weight(batch[0]).mean()


class Weight(mlo.Problem):
    def loss(self, batch, weighted):
        return F.cross_entropy(weighted(batch[0]), batch[1])


class Unsure(nn.Module):
    """Its second weight counts where the inputs' mean is above zero, its third nowhere."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(torch.ones(4, 3) for _ in range(3))

    def forward(self, x):
        return x @ self.weights[0] + (x @ self.weights[1] if x.mean() > 0 else 0)


def batches(dtype):
    """Three global batches of 8, and the part of them that is this process's."""
    generator = torch.Generator().manual_seed(1)
    part = distributed.share(8)
    for _ in range(3):
        x = torch.randn(8, 4, generator=generator, dtype=dtype)
        y = torch.randint(3, (8,), generator=generator)
        yield x[part], y[part]


def network(*extra, dtype=torch.float64):
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), *extra, nn.Linear(8, 3)).to(dtype)


def problem(module, dtype=torch.float64, **options):
    optimizer = torch.optim.SGD(module.parameters(), 0.5, momentum=0.9, weight_decay=0.01)
    data = list(batches(dtype))
    return Classify("classify", module=module, optimizer=optimizer, data=data, clip_norm=0.3, **options)


def trained(dtype, steps=5):
    """Weights and last loss of a training that begins differently in each process."""
    torch.manual_seed(distributed.rank())
    engine = mlo.Engine(problem(network(dtype=dtype), dtype), device="cpu")
    engine.run(steps)
    return {**engine.problems["classify"].module.state_dict(), "loss": engine.losses["classify"]}


def normalized():
    """The buffers that batch norm leaves."""
    torch.manual_seed(0)
    engine = mlo.Engine(problem(network(nn.BatchNorm1d(8))), device="cpu")
    engine.run(4)
    return dict(engine.problems["classify"].module.named_buffers())


def resumed(rounds=3):
    """States after 2 rounds and as many as ``rounds``, the second in an engine that goes on from the first's state."""
    states = []
    for halves in ((2 + rounds,), (2, rounds)):
        state = None
        for steps in halves:
            torch.manual_seed(0)
            engine = mlo.Engine(problem(network(nn.Dropout(0.5))), device="cpu")
            torch.manual_seed(7 + distributed.rank())
            if state is not None:
                torch.rand(3)
                engine.load_state_dict(state)
            engine.run(steps)
            state = engine.state_dict()
        states.append({"state": state, "next draw": torch.rand(())})
    return states


def partly_reached():
    """The weights of a module of which some are used in one process, and some in none."""
    torch.manual_seed(0)
    module = Unsure().double()
    x = torch.ones(2, 4, dtype=torch.float64) * (1 if distributed.is_main() else -1)
    optimizer = torch.optim.SGD(module.parameters(), 0.5, weight_decay=0.1)
    data = [(x, torch.tensor([0, 1]))]
    mlo.Engine(Classify("classify", module=module, optimizer=optimizer, data=data), device="cpu").run(2)
    return list(module.state_dict().values())


def bad_loss(defers):
    """What is reported of a NaN in the second process alone at step 3, and the weights before and after."""
    torch.manual_seed(0)
    classify = problem(network())
    with patch("mlo.training.engine.Updater", lambda device, deferred: Updater(CPU, deferred=defers)):
        engine = mlo.Engine(classify, device="cpu")
    engine.run(2)
    before = {name: value.clone() for name, value in classify.module.state_dict().items()}
    if not distributed.is_main():
        classify.stream.peek()[0].fill_(float("nan"))
    try:
        engine.run(4)
    except mlo.NonFiniteLossError as error:
        return {"error": str(error), "rounds": engine.rounds, "before": before, "after": classify.module.state_dict()}
    return None


def two_levels():
    """What is said of a problem that reads another."""
    stack = []
    for kind in (Weighted, Weight):
        module = nn.Linear(4, 3)
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        stack.append(kind(kind.__name__.lower(), module=module, optimizer=optimizer, data=list(batches(None))))
    try:
        mlo.Engine(stack, device="cpu")
    except mlo.ConfigError as error:
        return str(error)
    return None


def of_the_first():
    """What functions give that only the first process calls, or that raise there."""

    def fail():
        raise mlo.CheckpointError("the disk is full")

    seen = [distributed.on_main(lambda: f"from {distributed.rank()}"), distributed.any_of(not distributed.is_main())]
    try:
        distributed.on_main(fail)
    except mlo.CheckpointError as error:
        seen.append(str(error))
    return [*seen, distributed.any_of(False), distributed.gathered(distributed.rank())]


def main(folder):
    """Everything above, one after another."""
    with distributed.processes():
        seen = {
            "float32": trained(torch.float32),
            "float64": trained(torch.float64),
            "normalized": normalized(),
            "resumed": resumed(),
            "partly_reached": partly_reached(),
            "bad_loss": [bad_loss(defers) for defers in (False, True)],
            "two_levels": two_levels(),
            "of_the_first": of_the_first(),
        }
        torch.save(seen, folder / f"{distributed.rank()}.pt")
        os.chdir(folder)
        for words in (["resume", "stopped"], [*EVALUATION, "--output", "unbroken"]):
            sys.argv = ["mlo", *words]
            app(words, standalone_mode=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
