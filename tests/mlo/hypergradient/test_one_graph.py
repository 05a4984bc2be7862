"""Several virtual steps in one graph: when they are taken so, when not, and that either way is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from two_levels import Attention, Following, Judging

import mlo
from mlo.training import rounds

pytestmark = pytest.mark.usefixtures("float64")


def engine(
    low: type[mlo.Problem] = Following,
    module: Callable[[], nn.Module] = lambda: nn.Linear(3, 2),
    memory: float = 16.0,
    **options: object,
) -> mlo.Engine:
    """Four lower steps a round, which are known to fit into the memory after the first."""
    torch.manual_seed(0)
    one, two, data = module(), nn.Linear(3, 2), [torch.randn(4, 3) for _ in range(11)]
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9)
    stack = [
        low("low", module=one, optimizer=optimizer, data=data, steps=4, **options),
        Judging("top", module=two, optimizer=torch.optim.SGD(two.parameters(), lr=0.1), data=data),
    ]
    return mlo.Engine(stack, {"kind": "unrolled", "graph_memory": memory}, device="cpu")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps are taken in each graph of several."""
    counts: list[int] = []
    joined = rounds.in_one_graph

    def counted(of: Any, states: Any, batches: list, groups: Any) -> Any:
        counts.append(len(batches))
        return joined(of, states, batches, groups)

    monkeypatch.setattr(rounds, "in_one_graph", counted)
    return counts


def both(taken: list[int], expected: list[int], **options: Any) -> mlo.Engine:
    """Assert that with memory for it and without, the hypergradient is the same, and that so many steps were taken."""
    found = []
    for memory in (0.0, 16.0):
        made = engine(memory=memory, **options)
        made.run(2)
        del taken[:]
        np.random.seed(1)
        found.append(made.hypergradient("top")["weight"])
        assert taken == ([] if memory == 0.0 else expected)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-13)
    return made


def test_attention_takes_the_kernel_that_has_a_second_derivative(taken):
    mlo.check(both(taken, [4], module=Attention))


def test_momentum_passes_from_one_graph_to_the_one_before(taken, monkeypatch):
    """As where code of a few steps is compiled."""
    possible = rounds.how_many
    monkeypatch.setattr(rounds, "how_many", lambda of, before, left: min(2, possible(of, before, left)))
    mlo.check(both(taken, [2, 2]))


def test_gradients_that_are_accumulated_are_not_taken_in_one_graph(taken):
    mlo.check(both(taken, [], accumulate=2))


class Drawing(mlo.Problem):
    """With noise that is not torch's."""

    def loss(self, batch, top):
        return (self(batch) - np.random.rand() * top(batch)).square().mean()


def test_steps_that_draw_from_numpy_are_not_taken_in_one_graph(taken):
    both(taken, [], low=Drawing)


class Third(mlo.Problem):
    """Notes what its losses draw; its third virtual step after a round uses the function ``wrong``."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        self.third: Tensor | None = None
        self.wrong: Callable[[Tensor], Tensor] = torch.zeros_like
        self.drawn: list[float] = []

    def loss(self, batch, top):
        noise = torch.rand(())
        self.drawn.append(noise.item())
        own = self.wrong(batch[:, :2]) if batch is self.third else self(batch)
        return (own - noise * top(batch)).square().mean()


@pytest.fixture
def third() -> mlo.Engine:
    """Before the third virtual step: a loss in which its own variables do not count."""
    made = engine(low=Third)
    made.step()
    low = made.problems["low"]
    low.third = low.batches_ahead(2)[0]
    del low.drawn[:]
    return made


def test_a_step_that_reaches_no_variable_raises(third, taken):
    with pytest.raises(mlo.GraphError, match="'low': no gradient of its loss reaches its own parameters"):
        third.hypergradient("top")
    assert taken, "in one graph, until it was found out"


def test_a_failed_attempt_restores_the_random_state(third, taken):
    """Taken one by one, the steps draw the same numbers as in the attempt."""
    with pytest.raises(mlo.GraphError, match="no gradient"):
        third.hypergradient("top")
    drawn = third.problems["low"].drawn
    assert len(drawn) > taken[0]
    assert set(drawn) == set(drawn[: taken[0]])


def test_no_substitute_is_left_after_a_loss_that_raises_in_one_of_several_steps(third, taken):
    def fail(_: Tensor) -> Tensor:
        raise ZeroDivisionError

    third.problems["low"].wrong = fail
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        third.hypergradient("top")
    assert taken == [4]
    assert torch.equal(torch.get_rng_state(), state)
    for problem in third.problems.values():
        assert problem.params["weight"] is problem.module.weight
