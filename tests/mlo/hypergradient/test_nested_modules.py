"""The inner path through lower problems as people have them: accumulated gradients, and layers with statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mlo

pytestmark = pytest.mark.usefixtures("float64")
ESTIMATORS = ["unrolled", {"kind": "unrolled", "product": "forward"}]


class Low(mlo.Problem):
    def loss(self, batch, mid, top):
        own = self(batch)
        return (own - mid(batch)).square().mean() + (own * top(batch)).sin().mean()


class Mid(mlo.Problem):
    def loss(self, batch, low, top):
        own = self(batch)
        return (own - low(batch)).cos().mean() + (own * top(batch)).mean()


class Top(mlo.Problem):
    def loss(self, batch, mid, low):
        return (mid(batch) * low(batch)).square().mean()


def nested(data: list[Tensor], *layers: nn.Module, **low: object) -> list[mlo.Problem]:
    """Three small networks that read each other; the lowest has the ``layers`` too, and takes two steps a round."""
    torch.manual_seed(0)
    made: list[mlo.Problem] = []
    for cls, name in ((Low, "low"), (Mid, "mid"), (Top, "top")):
        module = nn.Sequential(nn.Linear(3, 4), *(layers if cls is Low else ()), nn.Tanh(), nn.Linear(4, 2))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        own = {"steps": 2, "data": data, **low} if cls is Low else {"data": rows(2)}
        made.append(cls(name, module=module, optimizer=optimizer, **own))
    return made


def rows(count: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 3) for _ in range(count)]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_accumulated_gradients_are_those_of_the_joined_batch(estimator):
    small = rows(6)
    joined = [torch.cat(small[:3]), torch.cat(small[3:])]
    stacks = nested(small, accumulate=3), nested(joined)
    engines = [mlo.Engine(stack, estimator, inner_path=True, device="cpu") for stack in stacks]
    for _ in range(2):
        found = [tuple(engine.hypergradient("top").values()) for engine in engines]
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-13)
        for engine in engines:
            engine.step()
    mlo.check(engines[0], "top")


class Remembering(nn.Module):
    """Its output depends on a buffer, which every call moves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.tensor(0.2))

    def forward(self, x: Tensor) -> Tensor:
        self.gain.mul_(0.9).add_(0.2)
        return x * self.gain


class Checkpointed(nn.Module):
    """A layer whose activations are computed again in the backward."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


LAYERS = {
    "batch norm": lambda: nn.BatchNorm1d(4),
    "layer norm": lambda: nn.LayerNorm(4),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "remembering": Remembering,
    "checkpointed batch norm": lambda: Checkpointed(nn.BatchNorm1d(4)),
    "checkpointed layer norm": lambda: Checkpointed(nn.LayerNorm(4)),
}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_are_differentiated_as_often_as_it_takes(layer, estimator, accumulate):
    """With two lower steps in it, curvature of the middle problem takes third derivatives of the lowest loss."""
    if (layer, estimator) == ("group norm", ESTIMATORS[1]):
        pytest.skip("torch's group norm has no forward derivative")
    stack = nested(rows(9), LAYERS[layer](), accumulate=accumulate)
    engine = mlo.Engine(stack, estimator, inner_path=True, device="cpu")
    engine.step()
    mlo.check(engine, "top")
