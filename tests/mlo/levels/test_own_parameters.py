"""Modules and losses that write into parameters while they run: refused, with the parameters as they were."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mlo
from tests.plain_loop import Factors, values


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.randn(4, 4) + 1), 0

    def forward(self, x):
        self.calls += 1
        return (x @ self.weight).tanh()


class Clamped(Base):
    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-0.5, 0.5)
        return super().forward(x)


class ClampedAfter(Base):
    """After what its backward pass needs."""

    def forward(self, x):
        output = super().forward(x)
        with torch.no_grad():
            self.weight.clamp_(-0.5, 0.5)
        return output


class ByData(Base):
    def forward(self, x):
        self.weight.data = self.weight.data / self.weight.data.norm()
        return super().forward(x)


class InPlaceByData(Base):
    def forward(self, x):
        self.weight.data.div_(self.weight.data.norm())
        return super().forward(x)


class ActNorm(Base):
    """Initial values from its first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.begun = nn.Parameter(torch.zeros(4)), False

    def forward(self, x):
        if not self.begun:
            self.shift.data.copy_(-x.mean(0))
            self.begun = True
        return super().forward(x + self.shift)


class PowerIteration(Base):
    """Of a spectral norm, whose vector is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x):
        with torch.no_grad():
            self.vector.copy_(F.normalize(self.weight @ self.vector, dim=0))
        return super().forward(x) / (self.weight @ self.vector).norm()


class Averaging(Base):
    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(4, 4), requires_grad=False)

    def forward(self, x):
        self.mean.data.lerp_(self.weight.data, 0.1)
        return super().forward(x) + x @ self.mean


class Functional(Base):
    def forward(self, x):
        rows = F.embedding(torch.arange(4), self.weight, max_norm=1.0)
        return (x @ rows).tanh()


class Words(Base):
    def __init__(self, kind: type[nn.Module] = nn.Embedding) -> None:
        super().__init__()
        self.words = kind(4, 4, max_norm=1.0)

    def forward(self, x):
        return super().forward(x) + self.words(torch.arange(4))


class Bags(Words):
    def __init__(self) -> None:
        super().__init__(nn.EmbeddingBag)

    def forward(self, x):
        return Base.forward(self, x) + self.words(torch.arange(4)[:, None])


class Later(Base):
    def forward(self, x):
        if self.calls == 9:
            with torch.no_grad():
                self.weight.clamp_(-0.5, 0.5)
        return super().forward(x)


class LaterByData(Base):
    def forward(self, x):
        if self.calls == 9:
            self.weight.data.clamp_(-0.5, 0.5)
        return super().forward(x)


class Fit(mlo.Problem):
    def loss(self, batch, factors):
        return (factors()[0] * (self(batch) - 0.3).square()).mean()


class Judge(mlo.Problem):
    def loss(self, batch, model):
        return (model(batch) + 0.3).square().mean()


def engine(module: nn.Module, estimator: object, fit: type[mlo.Problem] = Fit, **options) -> mlo.Engine:
    torch.manual_seed(0)
    top, data = Factors(), [torch.randn(4, 4) for _ in range(3)]
    trained = [p for p in module.parameters() if p.requires_grad]
    return mlo.Engine(
        [
            fit("model", module=module, optimizer=torch.optim.SGD(trained, lr=0.1), data=data, **options),
            Judge("factors", module=top.float(), optimizer=torch.optim.SGD(top.parameters(), lr=0.1), data=data),
        ],
        estimator,
        device="cpu",
    )


AT_ONCE = [Clamped, ClampedAfter, ByData, InPlaceByData, ActNorm, PowerIteration, Averaging, Functional]


@pytest.mark.parametrize("estimator", ["one_step", "unrolled", "darts", "cg"])
@pytest.mark.parametrize("kind", AT_ONCE)
def test_a_forward_that_writes_into_a_parameter_is_refused(kind, estimator):
    for call in ("step", "hypergradient", "objective"):
        module = kind()
        made = engine(module, estimator, steps=2)
        before, random = values([*module.parameters(), *module.buffers()]), torch.get_rng_state()
        with pytest.raises(
            mlo.GraphError, match=r"'model': evaluating its loss writes into the parameter '\w+' of its"
        ):
            made.step() if call == "step" else getattr(made, call)("factors")
        assert all(map(torch.equal, [*module.parameters(), *module.buffers()], before))
        assert torch.equal(torch.get_rng_state(), random)
        assert made.problems["model"].steps_taken == 0


@pytest.mark.parametrize("kind", [Words, Bags])
def test_max_norm_is_refused_when_the_engine_is_made(kind):
    with pytest.raises(mlo.GraphError, match=r"'model': the Embedding(Bag)? 'words' of its module has max_norm"):
        engine(kind(), "one_step")


def test_what_the_message_about_max_norm_says_is_the_same():
    e, max_norm = torch.randn(9, 4) * 2, 1.5
    scaled = e * (max_norm / e.norm(dim=-1, keepdim=True).clamp(min=1e-7)).clamp(max=1)
    torch.testing.assert_close(scaled, F.embedding(torch.arange(9), e.clone(), max_norm=max_norm))


@pytest.mark.parametrize("estimator", ["one_step", "unrolled", "cg"])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_later_write_is_refused_then(steps, estimator):
    """With four steps, several are one graph."""
    made = engine(Later(), estimator, steps=steps)
    with pytest.raises(mlo.GraphError, match=r"writes into the parameter 'weight' of .* keeps what was written"):
        made.run(8)


@pytest.mark.parametrize("kind", [Later, LaterByData])
def test_a_later_write_in_a_look_is_put_back(kind):
    module = kind()
    made = engine(module, "one_step")
    made.step()
    for call in (made.hypergradient, made.objective):
        module.calls = 9
        before = values(module.parameters())
        with pytest.raises(mlo.GraphError, match="writes into the parameter 'weight' of its module"):
            call("factors")
        assert all(map(torch.equal, module.parameters(), before))


def test_a_loss_that_writes_into_what_it_reads_is_refused():
    class Writes(mlo.Problem):
        def loss(self, batch, factors):
            with torch.no_grad():
                factors.params["logs"].clamp_(-0.1, 0.1)
            return (factors()[0] * (self(batch) - 0.3).square()).mean()

    made = engine(Base(), "one_step", Writes)
    before = values(made.problems["factors"].module.parameters())
    with pytest.raises(mlo.GraphError, match=r"'model': .* the parameter 'logs' of the module of 'factors'"):
        made.step()
    assert all(map(torch.equal, made.problems["factors"].module.parameters(), before))


def test_a_module_that_has_its_initial_values_trains():
    module = ActNorm()
    torch.manual_seed(0)
    module(torch.randn(4, 4))
    made = engine(module, "unrolled", steps=2)
    made.run(3)
    made.hypergradient("factors")


@pytest.mark.parametrize("kind", [Clamped, Words, Averaging])
def test_one_level_alone_trains_as_in_a_plain_loop(kind):
    """Nothing of it is evaluated twice."""

    class Alone(mlo.Problem):
        def loss(self, batch):
            return (self(batch) - 0.3).square().mean()

    found = []
    for plain in (True, False):
        torch.manual_seed(1)
        module, data = kind(), [torch.randn(4, 4) for _ in range(3)]
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        if plain:
            for batch in data:
                optimizer.zero_grad()
                (module(batch) - 0.3).square().mean().backward()
                optimizer.step()
        else:
            mlo.Engine([Alone("alone", module=module, optimizer=optimizer, data=data)], device="cpu").run(3)
        found.append(values(module.parameters()))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_weights_that_are_not_finite_are_not_taken_for_written():
    module = Base()
    made = engine(module, "one_step")
    with torch.no_grad():
        module.weight[0, 0] = float("nan")
    with pytest.raises(mlo.NonFiniteLossError):
        made.step()
    made.hypergradient("factors")
