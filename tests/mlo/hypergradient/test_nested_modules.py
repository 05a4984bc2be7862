"""The inner path through lower problems as people have them: accumulated gradients, and layers with statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from named_steps import optimizer_state, step_with_graph
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import mlo
from mlo.ops import torch_versions

pytestmark = pytest.mark.usefixtures("float64")
FORWARD = {"kind": "unrolled", "product": "forward"}
ESTIMATORS = ["unrolled", FORWARD]


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


class Sequences(nn.Module):
    """A layer for two channels of sequences, between others of four rows each."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.wide, self.layer, self.narrow = nn.Linear(4, 10), layer, nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.layer(self.wide(x).view(-1, 2, 5)).flatten(1))


LAYERS = {
    "batch norm": lambda: nn.BatchNorm1d(4),
    "layer norm": lambda: nn.LayerNorm(4),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "root-mean-square norm": lambda: nn.RMSNorm(4),
    "instance norm": lambda: Sequences(nn.InstanceNorm1d(2, affine=True)),
    "instance norm with running statistics": lambda: Sequences(nn.InstanceNorm1d(2, track_running_stats=True)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "remembering": Remembering,
    "checkpointed batch norm": lambda: Checkpointed(nn.BatchNorm1d(4)),
    "checkpointed layer norm": lambda: Checkpointed(nn.LayerNorm(4)),
    "checkpointed instance norm": lambda: Checkpointed(Sequences(nn.InstanceNorm1d(2))),
}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_are_differentiated_as_often_as_it_takes(layer, estimator, accumulate):
    """With two lower steps in it, curvature of the middle problem takes third derivatives of the lowest loss."""
    if (layer, estimator) == ("group norm", FORWARD):
        pytest.skip("torch's group norm has no forward derivative")
    if layer.startswith("checkpointed") and estimator is FORWARD and not torch_versions.CHECKPOINTS_FORWARD:
        pytest.skip("checkpointed activations have no forward derivative in this torch")
    stack = nested(rows(9), LAYERS[layer](), accumulate=accumulate)
    engine = mlo.Engine(stack, estimator, inner_path=True, device="cpu")
    engine.step()
    mlo.check(engine, "top")


class Plain(nn.Module):
    """What a normalization of torch's is by definition, with its weights: by mean and variance over a dimension."""

    def __init__(self, layer: nn.Module, dim: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight, self.bias, self.dim, self.shape = layer.weight, layer.bias, dim, shape

    def forward(self, x: Tensor) -> Tensor:
        away = x - x.mean(self.dim, keepdim=True)
        normal = away / (away.square().mean(self.dim, keepdim=True) + 1e-5).sqrt()
        return normal * self.weight.view(self.shape) + self.bias.view(self.shape)


def with_plain(module: nn.Module) -> nn.Module:
    """A copy of the lowest network, its normalization by plain operators."""
    twin = copy.deepcopy(module)
    if isinstance(twin[1], Sequences):
        twin[1].layer = Plain(twin[1].layer, 2, (-1, 1))
    else:
        twin[1] = Plain(twin[1], 0 if isinstance(twin[1], nn.BatchNorm1d) else 1, (-1,))
    return twin


def brute_force(stack: list[mlo.Problem]) -> dict[str, Tensor]:
    """All virtual steps as one graph of plain operators, differentiated by autograd."""
    low, mid, top = stack
    modules = {low: with_plain(low.module), mid: mid.module, top: top.module}
    at = {p: {n: w.detach().clone().requires_grad_() for n, w in modules[p].named_parameters()} for p in stack}

    def read(problem: mlo.Problem) -> Callable[[Tensor], Tensor]:
        return lambda batch, here=at[problem]: functional_call(modules[problem], here, (batch,))

    def gradients(loss: Tensor, of: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(zip(of, torch.autograd.grad(loss, list(of.values()), create_graph=True), strict=True))

    slots = optimizer_state(low)
    for step in range(low.steps):
        loss = Low.loss(read(low), low.stream.peek(step), read(mid), read(top))
        at[low], slots = step_with_graph(low, at[low], gradients(loss, at[low]), slots)
    found = gradients(Mid.loss(read(mid), mid.stream.peek(), read(low), read(top)), at[mid])
    start = {name: weight.detach() for name, weight in at[mid].items()}
    at[mid], _ = step_with_graph(mid, start, found, optimizer_state(mid))
    return gradients(Top.loss(read(top), top.stream.peek(), read(mid), read(low)), at[top])


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("layer", ["batch norm", "layer norm", "instance norm"])
def test_normalizations_agree_with_brute_force_on_plain_operators(layer, estimator, steps):
    stack = nested(rows(9), LAYERS[layer](), steps=steps)
    engine = mlo.Engine(stack, estimator, inner_path=True, device="cpu")
    for _ in range(2):
        engine.step()
        torch.testing.assert_close(engine.hypergradient("top"), brute_force(stack), rtol=1e-9, atol=1e-13)


class Dead(nn.Module):
    """A layer with a parameter whose gradient is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.dead = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * self.dead


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_a_parameter_with_a_zero_gradient_changes_nothing(name, estimator):
    """Nor does it with clipping, whose norm has a second derivative there too."""
    found = []
    for layers in ((), (Dead(),)):
        stack = nested(rows(2), *layers)
        module = stack[0].module
        optimizer = getattr(torch.optim, name)(module.parameters(), lr=0.01)
        stack[0] = Low("low", module=module, optimizer=optimizer, steps=2, data=rows(2), clip_norm=0.05)
        engine = mlo.Engine(stack, estimator, inner_path=True, device="cpu")
        found.append(engine.hypergradient("top"))
        mlo.check(engine, "top")
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-13)
