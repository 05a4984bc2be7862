"""In a round of LBT and of meta-weight-net, no estimator waits for the GPU; and how many kernels a round launches."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlo
from benchmarks.gpu.counting import Counting, count_round, count_step
from benchmarks.gpu.pretended import GPU, META, pretended_gpu
from benchmarks.gpu.workload import SMOKE, search_engine
from mlo.options.registry import ESTIMATORS, PRODUCTS, entries
from mlo.training import engine as engine_module
from mlo.training.captured import Captured

FEW = {
    "cg": {"iterations": 2},
    "neumann": {"terms": 2},
    "nystrom": {"rank": 2},
    "penalty": {"steps": 2},
    "truncated": {"steps": 2},
}
ONE_STEP = [{"kind": "one_step", "product": {"kind": product}} for product in sorted(entries(PRODUCTS))]
ALL = [{"kind": kind, **FEW.get(kind, {})} for kind in sorted(entries(ESTIMATORS))] + ONE_STEP


def student() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 2, 3, bias=False), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 10))


class Weighted(mlo.Problem):
    def loss(self, batch: tuple[Tensor, Tensor], weights: mlo.Problem) -> Tensor:
        losses = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        return (weights(losses.detach().unsqueeze(1)).squeeze(1) * losses).mean()


class Clean(mlo.Problem):
    def loss(self, batch: tuple[Tensor, Tensor], model: mlo.Problem) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])


def count_meta_weight_net(hypergradient: object, steps: int = 3) -> Counting:
    with META:
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))
        weights = nn.Sequential(nn.Linear(1, 5), nn.ReLU(), nn.Linear(5, 1), nn.Sigmoid())
        batch = torch.empty(4, 6), torch.zeros(4, dtype=torch.long)
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    adam = torch.optim.Adam(weights.parameters(), 1e-3)
    levels = [
        Weighted("model", module=model, optimizer=sgd, data=[batch], steps=steps, clip_norm=5.0),
        Clean("weights", module=weights, optimizer=adam, data=[batch]),
    ]
    with pretended_gpu():
        return count_step(mlo.Engine(levels, hypergradient, device="cuda").step)


@pytest.mark.parametrize("hypergradient", [kind for kind in ALL if kind["kind"] != "first_order"], ids=str)
def test_a_round_of_meta_weight_net_reads_nothing_on_the_host(hypergradient: object) -> None:
    assert count_meta_weight_net(hypergradient).launches


@pytest.mark.parametrize(
    "hypergradient",
    [pytest.param(kind, marks=() if kind["kind"] in ("darts", "sama") else pytest.mark.slow) for kind in ALL],
    ids=str,
)
def test_a_round_of_lbt_reads_nothing_on_the_host(hypergradient: object) -> None:
    assert count_round(student, channels=2, cells=3, batch=2, size=8, hypergradient=hypergradient).launches


@pytest.mark.parametrize("options", [{"dropout": 0.2}, {"student": False}], ids=str)
def test_a_captured_round_of_a_search_reads_nothing_on_the_host(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = partial(Captured, record=lambda function: (function(), function)[1])
    monkeypatch.setattr(engine_module, "Captured", record)
    with pretended_gpu():
        engine = search_engine(SMOKE, GPU, **options, capture=True)
        assert count_step(engine.step, before=4).launches
    assert engine.report().replayed > 0


def test_bookkeeping_is_a_small_part_of_the_launches() -> None:
    """Copies, guard, optimizer steps, their transposes, sums of cotangents; tensor by tensor, they are half of it."""
    found = count_round(student, channels=2, cells=3, batch=2, size=8)
    networks = sum(
        count for cause, count in found.by_cause.items() if cause.endswith(("forward passes", "backward passes"))
    )
    assert found.launches - networks < 0.1 * found.launches


@pytest.mark.slow
def test_a_round_at_the_papers_size_launches_at_most_27000_kernels() -> None:
    """By hand, in operators on lists and without running statistics, it is 24,700."""
    assert count_round().launches <= 27_000
