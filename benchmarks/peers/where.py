"""Where the time of one step of the tiny unroll goes, in microseconds: `python -m benchmarks.peers.where`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.func import functional_call

import mlo
from benchmarks.peers.by_hand import leaves, mlp
from benchmarks.peers.libraries import with_mlo
from benchmarks.peers.workloads import Bilevel, make
from mlo.hypergradient import Exact, Step
from mlo.hypergradient.step import copied
from mlo.operators import twice_differentiable
from mlo.optimizers import moment, virtual_step


def microseconds(call: Callable[[], object], count: int = 1000) -> float:
    """CPU time of a call, median of five blocks."""
    found = []
    for _ in range(6):
        begun = time.process_time()
        for _ in range(count):
            call()
        found.append(1e6 * (time.process_time() - begun) / count)
    return statistics.median(found[1:])


def pieces() -> dict[str, Callable[[], object]]:
    """{what: a call of it}, of the workload (d)."""
    task = make("tiny")
    assert isinstance(task, Bilevel)
    problems, top = with_mlo._bilevel(task)
    engine = mlo.Engine(problems, "unrolled", lookahead=False, device="cpu")
    engine.hypergradient(top)
    model, evaluator, gradients = engine.problems["model"], engine._evaluator, engine._gradients
    states = engine._live_states()
    states["model"] = copied(states["model"])
    batches, at = model.batches_ahead(), moment(model, copies=False)
    gradient = gradients.of("model", states, {}, batches, "virtual", (top,))
    step = Step(gradient.record(model, states["model"], at, states["model"], states), (top,), evaluator)
    curvature = Exact().at(step.before())
    point = leaves(list(task.model.parameters()))
    vector = task.direction(point)
    images = task.lower[0][0]
    named = dict(states["model"].parameters)

    def by_hand() -> torch.Tensor:
        return task.lower_loss(lambda x: mlp(point, x), task.weights, point, task.lower[0])

    def attention_kernel() -> None:
        with twice_differentiable():
            pass

    return {
        "by hand: the loss": by_hand,
        "by hand: its gradient, with the graph": lambda: torch.autograd.grad(by_hand(), point, create_graph=True),
        "the loss": lambda: evaluator.evaluate("model", states, batches[0], kind="virtual", through=(top,)),
        "  of it, functional_call of the network": lambda: functional_call(task.model, named, (images,)),
        "its gradient, with the graph": lambda: evaluator.differentiate(
            "model", states, batches[0], of=("model",), kind="virtual", through=(top,), keep_graph=True
        ),
        "  of it, choosing the attention kernel": attention_kernel,
        "the same, as the engine takes it": lambda: gradients.of("model", states, {}, batches, "virtual", (top,)),
        "the step": lambda: virtual_step(model, states["model"].parameters, gradient.own, at),
        "the product": lambda: curvature.both(vector),
        "the pullback through the optimizer": lambda: step.pull_through_optimizer(vector, curvature, {}),
    }


def main() -> None:
    """Print the pieces."""
    torch.set_num_threads(1)
    for what, call in pieces().items():
        print(f"{microseconds(call):6.0f}  {what}")


if __name__ == "__main__":
    main()
