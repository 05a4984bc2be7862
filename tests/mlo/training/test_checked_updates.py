"""Updates as on a GPU, driven here on the CPU: undone on the device, and reported when the losses have arrived."""

from __future__ import annotations

import pytest
import torch
from small_lbt import noisy_lbt

import mlo
from mlo.training import engine as engine_module
from mlo.training.commit import Updater


@pytest.fixture
def updater(monkeypatch: pytest.MonkeyPatch) -> Updater:
    """What engines made in this test update with: it acts as on a GPU."""
    made = Updater(torch.device("cpu"), deferred=True)
    monkeypatch.setattr(engine_module, "Updater", lambda device, deferred: made)
    return made


def tensors(problem: mlo.Problem) -> list[torch.Tensor]:
    state = [v for s in problem.optimizer.state.values() for k, v in s.items() if k != "step"]
    return [t.detach().clone() for t in [*problem.module.state_dict().values(), *state]]


def test_a_good_run_is_bit_identical(request):
    plain, deferred = noisy_lbt(), noisy_lbt()
    torch.manual_seed(1)
    mlo.Engine(plain, "one_step", device="cpu").run(5)
    request.getfixturevalue("updater")
    torch.manual_seed(1)
    mlo.Engine(deferred, "one_step", device="cpu").run(5)
    for one, other in zip(plain, deferred, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def test_nothing_moves_after_a_bad_loss_and_the_error_names_its_step(updater):
    stack = noisy_lbt()
    engine = mlo.Engine(stack, "one_step", device="cpu")
    engine.run(2)
    good = tensors(stack[0])
    batches = [stack[0].stream.peek(i) for i in range(3)]
    batches[0][0].fill_(float("nan"))
    updater.check_arrived = lambda: None  # as while a GPU has not sent its losses yet
    engine.step()
    engine.step()
    kept = [tensors(problem) for problem in stack]
    assert all(torch.equal(a, b) for a, b in zip(kept[0], good, strict=True))
    assert all(t.isfinite().all() for part in kept for t in part)
    del updater.check_arrived
    with pytest.raises(mlo.NonFiniteLossError, match="'teacher': its loss is nan at its step 3"):
        updater.wait()


@pytest.mark.usefixtures("updater")
def test_a_bad_first_step_leaves_the_optimizer_state_at_zero():
    stack = noisy_lbt()
    stack[1].stream.peek()["labeled"][0].fill_(float("inf"))
    engine = mlo.Engine(stack, "one_step", device="cpu")
    with pytest.raises(mlo.NonFiniteLossError, match="'student'"):
        engine.step()
    state = [v for s in stack[1].optimizer.state.values() for k, v in s.items() if k != "step"]
    assert state
    assert all(not v.any() for v in state)


class Shifted(mlo.Problem):
    def loss(self, batch):
        return self(batch[0]).square().mean() + batch[1]


class Rooted(mlo.Problem):
    def loss(self, batch):
        return (self(batch[0]) * batch[1]).abs().sqrt().sum()


@pytest.mark.usefixtures("updater")
@pytest.mark.parametrize(
    ("cls", "bad", "what"),
    [(Shifted, float("inf"), "loss is inf"), (Rooted, 0.0, "the gradient of its parameter 'weight' is nan")],
)
def test_a_loss_or_a_gradient_that_alone_is_not_finite_is_undone(cls, bad, what):
    model = torch.nn.Linear(2, 1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    problem = cls("model", module=model, optimizer=sgd, data=[(torch.ones(3, 2), torch.tensor(bad))])
    with pytest.raises(mlo.NonFiniteLossError, match=what):
        mlo.Engine(problem, device="cpu").run(1)
    assert all(map(torch.equal, model.parameters(), before))
