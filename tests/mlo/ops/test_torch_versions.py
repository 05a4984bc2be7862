"""What a release of torch lacks is refused in one sentence. Imitated here, so that any release tests it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from two_levels import Following, Judging

import mlo
from mlo.ops import torch_versions


class Checkpointed(nn.Module):
    """Its second layer is checkpointed, so that a forward derivative goes through its input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.two, self.one(x), use_reentrant=False)


class CheckpointedLoss(Following):
    def loss(self, batch, top):
        return checkpoint(torch.square, self(batch) - top(batch), use_reentrant=False).mean()


def two_levels(lower: type[mlo.Problem] = Following, module: type[nn.Module] = Checkpointed) -> list[mlo.Problem]:
    made = []
    for cls, name, of in ((lower, "low", module()), (Judging, "top", nn.Linear(3, 2))):
        made.append(cls(name, module=of, optimizer=torch.optim.SGD(of.parameters(), lr=0.1), data=[torch.ones(4, 3)]))
    return made


def test_compile_is_refused_where_gradients_cannot_be_compiled(monkeypatch):
    monkeypatch.setattr(torch_versions, "COMPILES_GRADIENTS", False)
    with pytest.raises(mlo.ConfigError, match=r"compile=True: torch [\d.]+\S* cannot .* install torch 2\.11 or later$"):
        mlo.Engine(two_levels(), compile=True, device="cpu")


@pytest.mark.parametrize(
    ("stack", "who"),
    [
        (two_levels, "problem 'low'"),
        (lambda: two_levels(CheckpointedLoss, lambda: nn.Linear(3, 2)), "a loss"),
    ],
    ids=["module", "loss"],
)
def test_the_product_forward_is_refused_where_checkpointing_has_no_forward_derivative(monkeypatch, stack, who):
    monkeypatch.setattr(torch_versions, "CHECKPOINTS_FORWARD", False)
    engine = mlo.Engine(stack(), {"kind": "one_step", "product": "forward"}, device="cpu")
    message = rf"^{who} checkpoints activations, .*; use another product than 'forward', .* or torch 2\.13 or later$"
    with pytest.raises(mlo.ConfigError, match=message):
        engine.step()
    mlo.Engine(stack(), "one_step", device="cpu").step()
