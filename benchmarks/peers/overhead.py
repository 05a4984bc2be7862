"""The overhead of the engine: time that is not arithmetic, in microseconds.

    python -m benchmarks.peers.overhead

First the parts of the tiny unroll, per step; then rounds of meta-weight-net, so small that arithmetic hardly counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

import mlo
from benchmarks.peers.by_hand import combined, leaves, mlp
from benchmarks.peers.libraries import build, with_mlo
from benchmarks.peers.workloads import Bilevel, make
from mlo.steps.losses import loss_of
from mlo.steps.optimizer import hyperparameters
from mlo.steps.scan import Joined, steps_of


def microseconds(calls: dict[str, Callable[[], object]], count: int = 10, rounds: int = 30) -> dict[str, float]:
    """CPU time of each call in microseconds: the minimum over ``rounds`` blocks; the calls take turns."""
    times = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for what, call in calls.items():
            start = time.process_time()
            for _ in range(count):
                call()
            times[what] = min(times[what], 1e6 * (time.process_time() - start) / count)
    return times


def pieces() -> dict[str, Callable[[], object]]:
    """{part: a function that runs it, for all steps of workload (d)}."""
    task = make("tiny")
    assert isinstance(task, Bilevel)
    problems, top = with_mlo._bilevel(task)
    engine = mlo.Engine(problems, "unrolled", lookahead=False, device="cpu")
    engine.hypergradient(top)
    hand = build("hand", make("tiny"), "unrolled")
    model, level = engine.problems["model"], engine._levels["model"]
    states = {name: problem.live_state()._replace(live=False) for name, problem in engine.problems.items()}
    states["model"] = states["model"]._replace(slots=model.optimizer_slots())
    batches, groups = [model.batches_ahead(n)[0] for n in range(task.steps)], hyperparameters(model)
    hyper = list(task.weights.parameters())

    def unrolled(network: Callable[[Sequence[Tensor], Tensor], Tensor]) -> Sequence[Tensor]:
        p: Sequence[Tensor] = leaves(list(task.model.parameters()))
        for batch in batches:
            loss = task.lower_loss(lambda x, p=p: network(p, x), task.weights, p, batch)
            p = combined(p, torch.autograd.grad(loss, p, create_graph=True), -task.lr)
        return p

    def called(p: Sequence[Tensor], images: Tensor) -> Tensor:
        return functional_call(task.model, dict(zip(model.variables, p, strict=True)), (images,))

    def several() -> Joined:
        _, end, _, losses, _ = steps_of(level, states, batches, groups, (top,), counts=False)
        return Joined(states["model"], end, losses)

    ends, taken = unrolled(mlp), several()
    vector = task.direction(ends)

    def losses() -> None:
        for batch in batches:
            loss_of(level, states, batch, (top,))

    def losses_by_hand() -> None:
        for batch in batches:
            task.lower_loss(lambda x: mlp(taken.start.variables, x), task.weights, taken.start.variables, batch)

    return {
        "by hand: the losses": losses_by_hand,
        "by hand: the steps, in one graph": lambda: unrolled(mlp),
        "the same, the network called by functional_call": lambda: unrolled(called),
        "by hand: the backward pass": lambda: torch.autograd.grad(ends, hyper, vector, retain_graph=True),
        "by hand: all": hand.round,
        "the losses": losses,
        "the steps, in one graph": several,
        "the backward pass": lambda: taken.pull(vector, (), hyper, True),
        "all": lambda: engine.hypergradient(top),
    }


def rounds() -> dict[str, Callable[[], object]]:
    """{estimator and library: a round of workload (a) with a 12-8-4 network}."""
    found: dict[str, Callable[[], object]] = {}
    for estimator in ("one_step", "darts", "neumann"):
        for library in ("hand", "mlo"):
            runner = build(library, make("mwn", "small"), estimator)
            found[f"{estimator}: {library}"] = runner.round
    return found


def main() -> None:
    """Print the times."""
    torch.set_num_threads(1)
    for calls, share in ((pieces(), 20), (rounds(), 1)):
        for what, found in microseconds(calls).items():
            print(f"{found / share:6.0f}  {what}")
        print()


if __name__ == "__main__":
    main()
