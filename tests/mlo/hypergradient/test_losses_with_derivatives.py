"""Losses that take derivatives themselves, of any kind, and losses with saved-tensor hooks of their own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import mlo

pytestmark = pytest.mark.usefixtures("float64")
FORWARD = {"kind": "unrolled", "product": "forward"}
AGAIN = {"kind": "unrolled", "graph_memory": 0}
ESTIMATORS = ["unrolled", AGAIN, FORWARD]
Call = Callable[[Tensor], Tensor]


def penalty(call: Call, x: Tensor) -> Tensor:
    """How far the gradient norm of each row is from 1."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    return (slope.square().sum(1) + 1e-3).sqrt().sub(1).square().mean()


class Low(mlo.Problem):
    """A fit, and a further term of the module's derivatives."""

    def __init__(self, name: str, *, term: Callable[[Call, Tensor], Tensor] = penalty, **problem: Any) -> None:
        super().__init__(name, **problem)
        self.term = term

    def loss(self, batch, up):
        fit = (self(batch) - up(batch)).sin().square().mean()
        return fit + self.term(self, batch + 0.1 * up(batch)).square().mean() * up(batch[:1]).exp().mean()


class LowReading(Low):
    """The further term is of the module that is read."""

    def loss(self, batch, up):
        return (self(batch) - up(batch)).square().mean() + (self.term(up, batch) * self(batch).mean()).square().mean()


class Up(mlo.Problem):
    def loss(self, batch, low):
        return (low(batch).sin() - 0.1).square().mean()


def engine_of(low: nn.Module, estimator: object, cls: type[Low] = Low, **options: Any) -> mlo.Engine:
    up = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    data = [torch.randn(6, 3) for _ in range(3)]
    problems = [
        cls("low", module=low, optimizer=torch.optim.SGD(low.parameters(), 0.1), data=data, **{"steps": 2, **options}),
        Up("up", module=up, optimizer=torch.optim.SGD(up.parameters(), 0.1), data=data),
    ]
    return mlo.Engine(problems, estimator, lookahead=False, device="cpu")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.mix(x).view(-1, 3, 2, 2).permute(1, 2, 0, 3)
        return F.scaled_dot_product_attention(query, key, value).transpose(0, 1).flatten(1)


class Recurrent(nn.Module):
    def __init__(self, cls: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = cls(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Distances(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.centers, self.p = nn.Parameter(torch.randn(4, 4)), p

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.centers, self.p)


def channels(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.Unflatten(1, (4, 4)), layer, nn.Flatten(), nn.Linear(16, 4))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: nn.LayerNorm(4),
    "batch norm": lambda: nn.BatchNorm1d(4),
    "batch norm in eval mode": lambda: nn.BatchNorm1d(4).eval(),
    "group norm": lambda: channels(nn.GroupNorm(2, 4)),
    "instance norm": lambda: channels(nn.InstanceNorm1d(4)),
    "root-mean-square norm": lambda: nn.RMSNorm(4),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "attention": Attention,
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0),
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "distances": lambda: Distances(2.0),
    "hard sigmoid": nn.Hardsigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
    "mish": nn.Mish,
    "dropout": lambda: nn.Dropout(0.3),
}


def slow_unless(quick: Collection[str], every: Iterable[str]) -> list[object]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in every]


@pytest.mark.parametrize("estimator", [FORWARD, "unrolled", pytest.param(AGAIN, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("layer", slow_unless(("layer norm", "batch norm", "attention", "hard sigmoid"), LAYERS))
def test_gradient_penalties_take_third_derivatives(layer, estimator):
    torch.manual_seed(layer == "transformer")  # with 0, its first step saturates it, and all derivatives are 0
    low = nn.Sequential(nn.Linear(3, 4), LAYERS[layer](), nn.Tanh(), nn.Linear(4, 3))
    mlo.check(engine_of(low, estimator, steps=1), directions=2)  # whose first evaluation keeps its graph
    engine = engine_of(low, estimator)
    engine.step()
    mlo.check(engine, directions=2)


@pytest.mark.parametrize("layer", ["weight norm", "attention", "lstm"])
def test_their_steps_are_those_of_plain_operators(layer):
    """The gradient of such a loss is a second derivative, which torch has not, or has wrong, for some layers."""
    torch.manual_seed(0)
    low = nn.Sequential(nn.Linear(3, 4), LAYERS[layer](), nn.Tanh(), nn.Linear(4, 3))
    engine = engine_of(low, "one_step", steps=1)
    problem, step = engine.problems["low"], 1e-6
    before = {name: p.detach().clone() for name, p in low.named_parameters()}

    def value(sign: float) -> Tensor:
        at = {name: p + sign * step * along[name] for name, p in before.items()}
        up = engine.problems["up"].module
        fake = type("Fake", (), {"term": staticmethod(penalty), "__call__": lambda _, x: functional_call(low, at, x)})()
        return Low.loss(fake, problem.stream.peek(), up)

    found = engine.hypergradient("low")
    along = {name: torch.randn_like(p) for name, p in before.items()}
    measured = (value(1.0) - value(-1.0)) / (2 * step)
    predicted = sum((found[name] * along[name]).sum() for name in before)
    torch.testing.assert_close(predicted, measured.detach(), rtol=1e-6, atol=1e-9)
    engine.step()
    after = {name: p - 0.1 * found[name] for name, p in before.items()}
    torch.testing.assert_close({name: p.detach() for name, p in low.named_parameters()}, after, rtol=1e-9, atol=1e-12)


def test_a_transposed_convolution_whose_third_derivative_torch_has_not():
    def made() -> nn.Module:
        torch.manual_seed(0)
        deconvolution = nn.ConvTranspose1d(1, 1, 3, stride=2, padding=1, output_padding=1)
        return nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (1, 4)), deconvolution, nn.Flatten(), nn.Linear(8, 3))

    mlo.check(engine_of(made(), FORWARD), directions=2)
    with pytest.raises(
        mlo.GraphError, match=r"output_padding .in '2' of .* has no second .* use the product 'forward'"
    ):
        engine_of(made(), "unrolled").step()


@pytest.mark.parametrize(("layer", "repeated"), [("weight norm", 1), ("layer norm", 1), ("softplus", 0)])
def test_only_the_first_evaluation_is_repeated_if_operators_are_replaced(layer, repeated):
    """The gradient of a step takes second derivatives here, and the product third ones."""
    torch.manual_seed(0)
    low = nn.Sequential(nn.Linear(3, 4), LAYERS[layer](), nn.Tanh(), nn.Linear(4, 3))
    engine = engine_of(low, {"kind": "one_step", "product": "forward"})
    passes = []
    for _ in range(3):
        before = engine.passes["low"]["step"]
        engine.step()
        passes.append(engine.passes["low"]["step"] - before)
    assert passes == [passes[1] * (2 + repeated) / 2, passes[1], passes[1]]


class PrivateNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, (4,))


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("estimator", [*ESTIMATORS, "cg"], ids=str)
def test_a_wrong_operator_that_cannot_be_replaced_is_refused(estimator, steps):
    """In some of these, no gradient is kept with its graph before the first update."""
    low = nn.Sequential(nn.Linear(3, 4), PrivateNorm(), nn.Tanh(), nn.Linear(4, 3))
    before = [p.detach().clone() for p in low.parameters()]
    with pytest.raises(mlo.GraphError, match=r"NativeLayerNorm\w+ by a private name, .* call torch\.nn\.functional"):
        engine_of(low, estimator, steps=steps).step()
    torch.testing.assert_close(list(low.parameters()), before, rtol=0, atol=0)


def row(call: Call) -> Call:
    return lambda z: call(z[None])[0]


def hooked(hooks: Callable[[], Any], call: Call, x: Tensor) -> Tensor:
    with hooks():
        return call(x).exp()


class Clones(torch.autograd.graph.saved_tensors_hooks):
    def __init__(self) -> None:
        super().__init__(lambda tensor: ("packed", tensor.clone()), lambda packed: packed[1])


TERMS: dict[str, Callable[[Call, Tensor], Tensor]] = {
    "grad": lambda call, x: grad(lambda z: call(z).sum())(x),
    "vjp": lambda call, x: vjp(call, x)[1](torch.ones_like(x))[0],
    "jvp": lambda call, x: jvp(call, (x,), (torch.ones_like(x),))[1],
    "jacrev": lambda call, x: vmap(jacrev(row(call)))(x),
    "jacfwd": lambda call, x: vmap(jacfwd(row(call)))(x),
    "hessian": lambda call, x: hessian(lambda z: row(call)(z).sum())(x[0]),
    "vmap": lambda call, x: vmap(row(call))(x),
    "jacobian of torch.autograd": lambda call, x: torch.autograd.functional.jacobian(call, x, create_graph=True),
    "hooks": lambda call, x: hooked(Clones, call, x),
    "save_on_cpu": lambda call, x: hooked(torch.autograd.graph.save_on_cpu, call, x),
    "checkpoint": lambda call, x: checkpoint(call, x, use_reentrant=False),
    "checkpoint of a function": lambda call, x: checkpoint(lambda z: call(z).sin(), x, use_reentrant=False),
}
TANGENTS = ("jvp", "jacfwd", "hessian")


@pytest.mark.parametrize("cls", [Low, LowReading])
@pytest.mark.parametrize("estimator", [FORWARD, "unrolled", pytest.param(AGAIN, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("term", slow_unless(("grad", "jvp", "vmap", "hooks", "checkpoint of a function"), TERMS))
def test_losses_may_use_transforms_and_hooks(term, estimator, cls):
    torch.manual_seed(0)
    engine = engine_of(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), estimator, cls, term=TERMS[term])
    if estimator is FORWARD and term in TANGENTS:
        before = [p.detach().clone() for p in engine.problems["low"].module.parameters()]
        with pytest.raises(mlo.GraphError, match=r"takes a forward-mode derivative .* use the product 'exact'"):
            engine.step()
        torch.testing.assert_close(list(engine.problems["low"].module.parameters()), before, rtol=0, atol=0)
        return
    engine.step()
    mlo.check(engine, directions=2)


@pytest.mark.parametrize(
    ("layer", "term"),
    [
        ("layer norm", "jvp"),
        ("instance norm", "hessian"),
        ("attention", "jvp"),
        ("batch norm in eval mode", "hessian"),
        ("hard sigmoid", "hessian"),
        ("layer norm", "vjp"),
    ],
)
def test_transforms_of_layers_without_higher_derivatives(layer, term):
    torch.manual_seed(0)
    low = nn.Sequential(nn.Linear(3, 4), LAYERS[layer](), nn.Tanh(), nn.Linear(4, 3))
    engine = engine_of(low, "unrolled", term=TERMS[term])
    engine.step()
    mlo.check(engine, directions=2)


@pytest.mark.parametrize(("term", "product"), [(TERMS["jvp"], "exact"), (penalty, "forward")], ids=["fails", "wrong"])
def test_a_repeated_first_evaluation_leaves_the_random_state_of_one(term, product):
    low = nn.Sequential(nn.Linear(3, 4), LAYERS["weight norm"](), nn.Tanh(), nn.Linear(4, 3))
    dropped: list[Tensor] = []

    def dropping(call: Call, x: Tensor) -> Tensor:
        dropped.append(F.dropout(x))
        return term(call, dropped[-1]) * F.dropout(torch.ones(3))

    engine = engine_of(low, {"kind": "one_step", "product": product}, term=dropping, steps=1)
    torch.manual_seed(0)
    engine.step()
    assert len(dropped) > 1
    assert all(torch.equal(each, dropped[0]) for each in dropped)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    F.dropout(dropped[0])
    F.dropout(torch.ones(3))
    assert torch.equal(torch.get_rng_state(), after)


class PerSample(mlo.Problem):
    """The gradient of each sample, as in differential privacy, with the parameters of the evaluation."""

    def loss(self, batch, up):
        def of_one(params: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(self.module, params, (x[None],)).square().sum()

        each = vmap(grad(of_one), (None, 0))(dict(self.params), batch)
        sizes = torch.stack([part.flatten(1).square().sum(1) for part in each.values()]).sum(0)
        return (sizes.clamp(max=1.0) * up(batch).square().mean(1)).mean() + (self(batch) - up(batch)).square().mean()


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_gradients_per_sample(estimator):
    torch.manual_seed(0)
    low, up, data = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), nn.Linear(3, 3), [torch.randn(6, 3)]
    problems = [
        PerSample("low", module=low, optimizer=torch.optim.SGD(low.parameters(), 0.1), data=data, steps=2),
        Up("up", module=up, optimizer=torch.optim.SGD(up.parameters(), 0.1), data=data),
    ]
    mlo.check(mlo.Engine(problems, estimator, device="cpu"), directions=2)
