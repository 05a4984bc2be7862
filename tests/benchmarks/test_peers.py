"""The comparison with other libraries: mlo, the hand-written loops and the references agree at small sizes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import needs
import pytest
import torch
from torch import Tensor, nn

from benchmarks.peers import environments, overhead, report, workloads
from benchmarks.peers.__main__ import Session
from benchmarks.peers.catalogue import ESTIMATORS, REFERENCES, WORKLOADS, Case, cases
from benchmarks.peers.libraries import build
from benchmarks.peers.reference import flat, reference
from benchmarks.peers.workloads import make
from mlo.ops import compiler

PAIRS = [(workload, estimator) for workload in WORKLOADS for estimator in ESTIMATORS[workload]]


class StandIn(nn.Module):
    """A small language model with the interface of the GPT, where transformers is not installed."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Parameter(torch.randn(length, width))
        self.layer = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        found = self.tokens(tokens) + self.places
        return torch.tanh(self.layer(found.cumsum(1))) @ self.tokens.weight.T


@pytest.fixture(autouse=True)
def _without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("transformers") is None:
        monkeypatch.setattr(workloads, "LanguageModel", StandIn)


def first_gradient(library: str, workload: str, estimator: str) -> torch.Tensor:
    return flat(build(library, make(workload, "small", torch.float64), estimator).gradient())


@pytest.mark.parametrize(("workload", "estimator"), PAIRS)
def test_mlo_and_the_loop_by_hand_agree(workload: str, estimator: str) -> None:
    ours, theirs = (first_gradient(library, workload, estimator) for library in ("mlo", "hand"))
    assert (ours - theirs).norm() <= 1e-8 * theirs.norm()


def test_the_parts_of_the_unroll_compute_the_same() -> None:
    found = {what.strip(): call() for what, call in overhead.pieces().items()}
    steps = "the steps, in one graph"
    torch.testing.assert_close(list(found[steps].end.variables), found[f"by hand: {steps}"])
    torch.testing.assert_close(found["the backward pass"][2], found["by hand: the backward pass"])


@needs.compiled_gradients
def test_compiled_rows_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compiler._OPTIONS, "backend", "aot_eager")
    monkeypatch.delitem(compiler._OPTIONS, "options")
    for workload, estimator in (("clean512", "product"), ("tiny", "recomputed"), ("gpt4", "unrolled")):
        run = build("compiled", make(workload, "small", torch.float64), estimator)
        run.gradient()  # the first pass of each problem runs uncompiled
        ours, theirs = flat(run.gradient()), first_gradient("hand", workload, estimator)
        assert (ours - theirs).norm() <= 1e-8 * theirs.norm()


@pytest.mark.parametrize(("workload", "estimator"), PAIRS)
def test_the_loop_by_hand_agrees_with_the_reference(workload: str, estimator: str) -> None:
    exact = reference(workload, REFERENCES[estimator], "small")
    error = (first_gradient("hand", workload, estimator) - exact).norm() / exact.norm()
    assert error <= (0.1 if estimator in ("darts", "sama") else 1e-8)  # a finite difference across kinks of ReLU


@pytest.mark.parametrize("library", ["mlo", "hand"])
@pytest.mark.parametrize(("workload", "estimator"), PAIRS)
def test_only_rounds_of_training_workloads_change_the_upper_level(library: str, workload: str, estimator: str) -> None:
    task = make(workload, "small")
    run = build(library, task, estimator)
    run.gradient()
    upper = task.arch if workload == "lbt" else task.weights
    before = [p.detach().clone() for p in upper.parameters()]
    for _ in range(3):
        run.round()
    moved = any(not torch.equal(a, b) for a, b in zip(before, upper.parameters(), strict=True))
    assert moved == task.trains


def test_the_gpt_has_the_size_that_its_description_gives() -> None:
    pytest.importorskip("transformers")
    task = make("gpt")
    assert f"{sum(p.numel() for p in task.model.parameters()) / 1e6:.1f} million" in WORKLOADS["gpt"]
    assert task.model(task.upper[0]).shape == (8, 128, 512)


@pytest.mark.parametrize("case", [c for c in cases(library="jax") if c.workload != "clean8192"], ids=lambda c: c.name)
def test_jax_and_the_loop_by_hand_agree(case: Case) -> None:
    pytest.importorskip("jax")
    ours, theirs = (first_gradient(library, case.workload, case.estimator) for library in ("jax", "hand"))
    assert (ours - theirs).norm() <= 1e-8 * theirs.norm()


def test_jax_trains_as_the_loop_by_hand_does() -> None:
    pytest.importorskip("jax")
    task = make("mwn", "small", torch.float64)
    ours, theirs = build("jax", task, "one_step"), build("hand", make("mwn", "small", torch.float64), "one_step")
    for _ in range(4):
        ours.round()
        theirs.round()
    found, expected = ours._state[2], theirs._hyper
    torch.testing.assert_close(
        [torch.tensor(x.tolist(), dtype=torch.float64) for x in found], [*map(Tensor.detach, expected)]
    )


def test_what_cannot_be_installed_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(name: str, folder: Path) -> Path:
        raise RuntimeError(f"no {name}")

    monkeypatch.setattr(environments, "interpreter", fails)
    session = Session(tmp_path, tmp_path / "rows", "small")
    for case, name in ((Case("gpt", "mlo", "one_step"), "transformers"), (Case("mwn", "jax", "cg"), "jax")):
        (session.output / f"{case.workload}-{REFERENCES[case.estimator]}.pt").touch()
        assert session.measure(case) == {"failed": f"cannot be installed: no {name}"}


def test_every_library_and_workload_that_needs_packages_has_an_environment() -> None:
    assert {case.environment for case in cases()} == {"hand", "mlo", "compiled", *environments.REQUIREMENTS}


def test_the_page_shows_failures_and_missed_targets() -> None:
    fine = {"ratio": 1.2, "quartiles": [1.1, 1.3], "milliseconds": 2.4, "hand_milliseconds": 2.0, "error": 1e-7}
    fine |= {"cosine": 1.0, "peak_mb": 700.0, "baseline_mb": 650.0, "default_over_mb": 60.0, "torch": "2.x"}
    rows = {case: {"failed": "KeyError: 'params'"} if case.library == "betty" else fine for case in cases("tiny")}
    rows |= {Case("tiny", "betty", "unrolled"): {"failed": "KeyError: 'params'"}}
    page = report.page(rows, {"cpu": "a CPU", "python": "3"})
    assert "| Betty 0.2.1 | `KeyError: 'params'` |" in page
    assert "| tiny, `unrolled`: time over the hand-written loop | 1.10 | 1.20 | missed |" in page


def test_the_page_opens_with_where_mlo_wins_and_where_it_does_not() -> None:
    ratios = {"hand": 1.0, "mlo": 1.2, "compiled": 0.5, "torchopt": 0.9, "higher": 0.8}

    def row(library: str) -> dict[str, object]:
        return {"ratio": ratios[library], "quartiles": [ratios[library] - 0.17, ratios[library] + 0.17]}

    rows = {case: row(case.library) for case in cases("mwn") if case.library in ratios}
    rows |= {Case("tiny", library, "unrolled"): row(library) for library in ("hand", "mlo", "higher")}
    rows[Case("tiny", "betty", "unrolled")] = {"failed": "KeyError: 'params'"}
    said = report.summary(rows)
    assert (
        "the fastest library in 3 of 4 comparisons, with the largest lead for `cg` on meta-weight-net (0.50; Torch"
        in said
    )
    assert (
        "but another library is faster for `unrolled` on hyper-cleaning of a tiny network (1.20; higher 0.80)." in said
    )
    assert "In 1 of the 3, the quartiles overlap" in said
    assert "Without compiling, `mlo` takes 1.20 to 1.20 times as long" in said
    assert report.summary({case: row for case, row in rows.items() if case.library in ("hand", "mlo")}) == ""
    rows |= {Case("tiny", "jax", "unrolled"): {"ratio": 0.3}, Case("mwn", "jax", "cg"): {"ratio": 0.6}}
    assert "in 3 of 4 comparisons" in report.summary(rows)  # no library
    assert "takes 0.30 to 0.60 times as long" in report.summary(rows)
    assert "is faster than `mlo` in 1 of 2 comparisons." in report.summary(rows)


def test_the_documented_page_has_the_words_that_the_report_writes() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md").read_text()
    begin, end = report.HEAD.index("## How to read"), report.HEAD.index("| name")
    assert report.HEAD[begin:end] in text
    assert report.TARGETS_HEAD in text
    assert text.endswith(report.TAIL)
