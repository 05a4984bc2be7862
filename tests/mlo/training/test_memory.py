"""When memory runs out: the same error, with the problem, its estimator and what needs less memory."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from two_levels import Judging

import mlo


class Fails(torch.autograd.Function):
    """The identity, whose second backward runs out of memory."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return FailsAgain.apply(grad)


EVALUATIONS = Counter[str]()


class FailsAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


class Low(mlo.Problem):
    """Runs out of memory in a step (its first evaluation), in a product (a later one), or in a pullback."""

    where = ""

    def loss(self, batch, top):
        EVALUATIONS["low"] += 1
        if self.where == ("step" if EVALUATIONS["low"] == 1 else "product"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        own = self(batch)
        return ((Fails.apply(own) if self.where == "pullback" else own) - top(batch)).square().mean()


def engine(where: str, estimator: object, **options: object) -> mlo.Engine:
    torch.manual_seed(0)
    EVALUATIONS.clear()
    made, data = [], [torch.randn(4, 3)]
    for name, cls in (("low", Low), ("top", Judging)):
        module = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        made.append(cls(name, module=module, optimizer=optimizer, data=data))
    made[0].where = where
    return mlo.Engine(made, estimator, device="cpu", **options)


def notes(run) -> str:
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as caught:
        run()
    assert type(caught.value) is torch.OutOfMemoryError is torch.cuda.OutOfMemoryError
    return "\n".join(caught.value.__notes__)


CALLS = {
    "step": lambda engine: engine.step(),
    "hypergradient": lambda engine: engine.hypergradient("top"),
    "objective": lambda engine: engine.objective("top"),
}


@pytest.mark.parametrize("call", CALLS)
def test_in_a_step_the_note_names_the_problem_its_estimator_and_the_cheaper_ones(call):
    found = notes(lambda: CALLS[call](engine("step", "unrolled")))
    assert found.startswith("Memory ran out in an evaluation of the loss of problem 'low'.\nWhat needs less memory:\n")
    assert "- 'low' is differentiated by Unrolled(" in found
    for cheaper in ("'truncated'", "graph_memory=0", "store_on='cpu'", "'darts' or 'sama'", "accumulate=2"):
        assert cheaper in found
    assert "differentiated through" not in found


@pytest.mark.parametrize("call", ["step", "hypergradient"])
def test_in_a_product_it_also_says_what_was_differentiated(call):
    found = notes(lambda: CALLS[call](engine("product", "darts")))
    assert found.startswith(
        "Memory ran out in an evaluation of the loss of problem 'low'.\n"
        "Memory ran out while 'top' was differentiated through the training of 'low'.\n"
    )
    assert "'low' is differentiated by Darts(radius=0.01). It keeps no graph of a gradient." in found
    assert "accumulate=2" in found


@pytest.mark.parametrize("compile", [False, True])
def test_in_a_pullback(compile, monkeypatch):
    monkeypatch.setattr("torch.compile", lambda run, **options: run)  # what is compiled, run
    made = engine("pullback", "one_step", compile=compile)
    found = notes(lambda: made.run(3))
    assert found.startswith("Memory ran out while 'top' was differentiated through the training of 'low'.\n")
    assert "Less: 'darts' or 'sama', which keep no graph of a gradient." in found
    assert "truncated" not in found


def test_it_is_not_taken_for_a_function_that_cannot_be_compiled(monkeypatch):
    monkeypatch.setattr("torch.compile", lambda run, **options: run)
    made = engine("", "one_step", compile=True)
    made.step()
    made.problems["low"].where = "product"  # from the second pass on, the compiled one
    found = notes(made.step)
    assert "Memory ran out in an evaluation of the loss of problem 'low'." in found
    assert not made.report().problems["low"].not_compiled


def test_nothing_is_noted_on_another_error():
    made = engine("", "darts")
    made.problems["low"].loss = None
    with pytest.raises(TypeError) as caught:
        made.step()
    assert not any("memory" in note for note in getattr(caught.value, "__notes__", ()))
