"""Sparse gradients, of ``nn.Embedding(sparse=True)``: the same results as with dense ones, or an error that says so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mlo

pytestmark = pytest.mark.usefixtures("float64")

ESTIMATORS = [
    "one_step",
    {"kind": "one_step", "product": "one_sided"},
    "unrolled",
    {"kind": "unrolled", "graph_memory": 0},
    "darts",
    "sama",
    "penalty",
    {"kind": "cg", "damping": 0.1},
    {"kind": "nystrom", "damping": 0.1},
    "neumann",
]
OPTIMIZERS = [("SGD", {}), ("SGD", {"momentum": 0.5}), ("Adagrad", {}), ("Adam", {})]
IDS = ["SGD", "momentum", "Adagrad", "Adam"]


class Words(nn.Module):
    """An embedding (or a bag of them), and a layer that is dense."""

    def __init__(self, sparse: bool, bag: bool) -> None:
        super().__init__()
        self.words = (nn.EmbeddingBag if bag else nn.Embedding)(12, 3, sparse=sparse)
        self.layer = nn.Linear(3, 3)

    def forward(self, indices: Tensor) -> Tensor:
        found = self.words(indices)
        return self.layer((found if found.dim() == 2 else found.mean(1)).tanh())


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.linspace(-0.3, 0.4, 20))

    def forward(self) -> Tensor:
        return self.logs.exp()


class Fit(mlo.Problem):
    def loss(self, batch, upper):
        return (upper() * (self(batch[0]) - batch[1]).square().sum(1)).mean()


class Judge(mlo.Problem):
    def loss(self, batch, low):
        return (low(batch[0]) - batch[1]).square().mean()


def engine(
    sparse: bool, estimator: object, name: str = "SGD", options: object = None, bag: bool = False, **problem: object
) -> mlo.Engine:
    torch.manual_seed(0)
    low, upper = Words(sparse, bag), Weights()
    batches = [(torch.randint(0, 12, (20, 4)), torch.randn(20, 3)) for _ in range(3)]
    optimizer = getattr(torch.optim, name)(low.words.parameters() if name == "SparseAdam" else low.parameters(), 0.1)
    for group in optimizer.param_groups:
        group.update(options or {})
    levels = [
        Fit("low", module=low, optimizer=optimizer, data=batches[:2], steps=2, **problem),
        Judge("upper", module=upper, optimizer=torch.optim.SGD(upper.parameters(), 0.1), data=batches[2:]),
    ]
    return mlo.Engine(levels, estimator, device="cpu")


def outcome(run: mlo.Engine) -> list[Tensor]:
    run.run(2)
    return [*run.hypergradient("upper").values(), *[p.detach() for p in run.problems["low"].params.values()]]


def assert_alike(*args: object, **options: object) -> None:
    dense, sparse = (outcome(engine(sparse, *args, **options)) for sparse in (False, True))
    torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_every_estimator(estimator):
    assert_alike(estimator)


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=IDS)
@pytest.mark.parametrize("estimator", ["unrolled", "cg"])
def test_every_optimizer_with_clipping_and_accumulation(estimator, name, options):
    assert_alike(estimator, name, options)
    assert_alike(estimator, name, options, clip_norm=0.1)
    assert_alike(estimator, name, options, accumulate=2)


def test_sparse_adam_steps_as_by_itself_and_is_differentiated_at_the_minimum():
    run = engine(True, {"kind": "cg", "damping": 1.0}, "SparseAdam")
    twin = engine(True, {"kind": "cg", "damping": 1.0}, "SparseAdam")
    low, upper, data = twin.problems["low"], twin.problems["upper"], twin.problems["low"].stream
    optimizer = torch.optim.SparseAdam(low.module.words.parameters(), 0.1)
    for _ in range(2):
        x, y = data.next()
        optimizer.zero_grad()
        (upper.module() * (low.module(x) - y).square().sum(1)).mean().backward()
        optimizer.step()
    run.run(1)
    torch.testing.assert_close(run.problems["low"].module.words.weight, low.module.words.weight)
    assert run.hypergradient("upper").metrics["low/residual"] < 1e-9
    with pytest.raises(mlo.ConfigError, match="a step of SparseAdam cannot be differentiated"):
        engine(True, "one_step", "SparseAdam")


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("estimator", ["one_step", "unrolled", "cg"])
def test_a_bag_has_no_second_derivative_and_the_error_says_what_does_without(estimator, sparse):
    run = engine(sparse, estimator, bag=True)
    before = [p.detach().clone() for p in run.problems["low"].module.parameters()]
    with pytest.raises(mlo.GraphError, match=r"'low': its loss uses embedding_bag .*use nn.Embedding .* 'darts'"):
        run.hypergradient("upper")
    assert all(map(torch.equal, run.problems["low"].module.parameters(), before))


@pytest.mark.parametrize("estimator", ["darts", "sama", "penalty"])
def test_a_bag_works_without_second_derivatives(estimator):
    assert_alike(estimator, bag=True)


def test_a_sparse_state_of_earlier_steps_is_refused():
    module = nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.5)
    module(torch.tensor([1, 2])).sum().backward()
    optimizer.step()

    class Low(mlo.Problem):
        def loss(self, batch, top):
            return (self(torch.tensor([1, 2])) * top(torch.ones(1, 1))).square().mean()

    class Top(mlo.Problem):
        def loss(self, batch, low):
            return low(torch.tensor([1, 3])).square().mean()

    def engine() -> mlo.Engine:
        upper = nn.Linear(1, 1)
        top = Top("top", module=upper, optimizer=torch.optim.SGD(upper.parameters(), lr=0.1))
        return mlo.Engine([Low("low", module=module, optimizer=optimizer), top], device="cpu")

    with pytest.raises(mlo.ConfigError, match=r"'low': the state 'momentum_buffer' .* '0.weight' is sparse.*to_dense"):
        engine()
    state = optimizer.state[module[0].weight]
    state["momentum_buffer"] = state["momentum_buffer"].to_dense()
    engine().step()
