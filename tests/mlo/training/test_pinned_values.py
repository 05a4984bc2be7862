"""Short trainings of every kind, in float64: what they end in is compared with values stored in the repository.

The other tests say that hypergradients are right; this one says that nothing has changed, to 12 digits: random draws,
buffers, optimizer states, metrics. Rebuilding the core must leave it green. After a change that is meant to alter these
values (another torch release may, too), write them anew, and say in the commit why:
``PYTHONPATH=tests python tests/mlo/training/test_pinned_values.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from analytic import NESTED_WITH_INNER_PATH, Smooth
from brute_force import small_lbt
from engine_state import same
from small_lbt import noisy_lbt
from torch import Tensor, nn

import mlo

STORED = Path(__file__).with_name("pinned_values.json")
ROUNDS = 3


class Fit(mlo.Problem):
    def loss(self, batch, weight):
        x, y = batch
        return (weight(x).sigmoid() * F.cross_entropy(self(x), y, reduction="none")).mean()


class Weight(mlo.Problem):
    def loss(self, batch, fit):
        x, y = batch
        return F.cross_entropy(fit(x), y)


def two_levels() -> list[mlo.Problem]:
    """A network, and weights of its training images (Ren et al. 2018)."""
    torch.manual_seed(0)
    fit, weight = (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)),
    )
    data = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(3)]
    sgd = torch.optim.SGD(fit.parameters(), 0.2, momentum=0.9, weight_decay=0.01)
    return [
        Fit("fit", module=fit, optimizer=sgd, data=data, steps=2),
        Weight("weight", module=weight, optimizer=torch.optim.SGD(weight.parameters(), 0.5), data=data),
    ]


def nested() -> list[mlo.Problem]:
    return Smooth.make(NESTED_WITH_INNER_PATH, settled=False).problems(steps=2)


def at_solution(estimator: object) -> Callable[[], mlo.Engine]:
    return lambda: mlo.Engine(small_lbt("momentum"), estimator, device="cpu")


ENGINES: dict[str, Callable[[], mlo.Engine]] = {
    "two levels, one_step": lambda: mlo.Engine(two_levels(), "one_step", device="cpu"),
    "AdamW, unrolled": lambda: mlo.Engine(small_lbt("adamw", steps=3), "unrolled", device="cpu"),
    "Adam, truncated": lambda: mlo.Engine(small_lbt("adam", steps=3), {"kind": "truncated", "steps": 2}, device="cpu"),
    "dropout and batch norm, darts": lambda: mlo.Engine(noisy_lbt(), "darts", device="cpu"),
    "dropout and batch norm, recomputed steps": lambda: mlo.Engine(
        noisy_lbt(student={"steps": 3}), {"kind": "unrolled", "every": 2, "graph_memory": 0.0}, device="cpu"
    ),
    "micro-batches and clipping": lambda: mlo.Engine(
        small_lbt("momentum", steps=2, accumulate=2, clip_norm=0.3), "one_step", lookahead=True, device="cpu"
    ),
    "inner path": lambda: mlo.Engine(nested(), "unrolled", inner_path=True, device="cpu"),
    "cg": at_solution({"kind": "cg", "damping": 1.0, "iterations": 3, "warm_start": True}),
    "neumann": at_solution({"kind": "neumann", "terms": 3, "rate": 0.1}),
    "nystrom": at_solution({"kind": "nystrom", "rank": 3, "damping": 1.0}),
    "penalty": at_solution({"kind": "penalty", "steps": 2}),
    "sama": at_solution("sama"),
}


def trained(name: str) -> dict[str, Tensor]:
    """Everything that some rounds end in."""
    engine = ENGINES[name]()
    torch.manual_seed(1)
    engine.run(ROUNDS)
    found: dict[str, Tensor | float] = {f"metric {key}": value for key, value in engine.metrics().items()}
    for level, problem in engine.problems.items():
        found |= {f"{level} {key}": value for key, value in problem.module.state_dict().items()}
        for number, slots in problem.optimizer.state_dict()["state"].items():
            found |= {f"{level} optimizer {number} {key}": v for key, v in slots.items() if isinstance(v, Tensor)}
    top = list(engine.problems)[-1]
    found |= {f"next hypergradient {key}": value for key, value in engine.hypergradient(top).items()}
    found["next random number"] = torch.rand(())
    return {key: torch.as_tensor(value).double().flatten() for key, value in found.items()}


def summary(value: Tensor) -> list[float]:
    """Its size, its norm, and a sum that every number is in with a weight of its own."""
    weights = torch.arange(value.numel(), dtype=torch.float64).cos()
    return [value.numel(), value.norm().item(), (value @ weights).item()]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ENGINES)
def test_a_training_ends_in_the_stored_values(name):
    found, stored = trained(name), json.loads(STORED.read_text())[name]
    assert found.keys() == stored.keys()
    for key, value in found.items():
        near = 1e-12 * stored[key][1] + 1e-15  # the last bits differ between CPUs
        assert summary(value) == pytest.approx(stored[key], rel=0, abs=near), key
    assert same(trained(name), found), "the same training twice gives the same bits"


def write() -> None:
    """Store what trainings end in now."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    found = {name: {key: summary(value) for key, value in trained(name).items()} for name in ENGINES}
    lines = [f"{json.dumps(name)}: {json.dumps(each)}" for name, each in found.items()]
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write()
