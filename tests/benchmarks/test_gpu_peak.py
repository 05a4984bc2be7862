"""The peak memory of a round by estimator: it grows with what an estimator keeps."""

from __future__ import annotations

import pytest

from benchmarks.gpu import peak
from benchmarks.gpu.workload import SMOKE


@pytest.mark.slow
def test_an_exact_product_keeps_more_than_a_difference_and_that_more_than_nothing(monkeypatch):
    kept = ("`first_order`", "`darts`", "`one_step`, product `exact`")
    monkeypatch.setattr(peak, "ESTIMATORS", {name: peak.ESTIMATORS[name] for name in kept})
    found = peak.peaks(SMOKE)
    (alone, taught), (of_darts, taught_by_darts), (exact, taught_exactly) = found.values()
    assert alone < of_darts < exact
    assert taught < taught_by_darts < taught_exactly
    assert peak.table({"`darts`": (1_500_000_000, 2_000_000_000)}).endswith("| `darts` | 1.5 | 2.0 |")
