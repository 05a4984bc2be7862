"""The rule of the early stop, on histories of eigenvalues."""

from __future__ import annotations

import math

import pytest

from problems.search.early_stop import early_stop_epoch

RISING = [1.0] * 12 + [1.0, 1.0, 1.0, 2.0, 4.0]
"""The mean around epoch 14 is 9/5 of that around epoch 10, once epoch 16 is known."""


def test_the_search_stops_when_the_mean_rises_and_returns_the_epoch_before():
    assert early_stop_epoch(RISING) == 10
    assert early_stop_epoch(RISING[:-1]) is None  # epoch 14 has no full window yet
    assert early_stop_epoch([*RISING, 100.0]) == 10  # the first decision is kept
    assert early_stop_epoch(RISING, first=11) is None
    assert early_stop_epoch(RISING[1:]) is None  # it would be epoch 9
    assert early_stop_epoch(RISING[1:], first=9) == 9
    assert early_stop_epoch([]) is None
    assert early_stop_epoch([1.0] * 50) is None


def test_the_ratio_must_be_exceeded():
    level = [1.0] * 14 + [1.0, 1.0, 2.5]
    assert early_stop_epoch(level) is None  # 6.5 / 5 is exactly 1.3
    level[-1] = 2.51
    assert early_stop_epoch(level) == 10
    assert early_stop_epoch(level, ratio=1.31) is None


def test_the_means_are_centered_at_both_epochs():
    """Means of 3 around epochs 2 and 4: of entries 1 to 3, and 3 to 5; entries 0 and 6 must not count."""
    history = [50.0, 1.0, 2.0, 3.0, 4.0, 8.0]
    assert early_stop_epoch(history, window=3, lag=2, ratio=2.4, first=2) == 2  # 5 against 2
    assert early_stop_epoch(history, window=3, lag=2, ratio=2.6, first=2) is None
    assert early_stop_epoch(history, window=3, lag=3, ratio=0.1, first=0) == 1  # 0 has no full window
    assert early_stop_epoch([1.0, 2.0], window=1, lag=1, ratio=1.5, first=0) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 4}, "odd number of epochs, not 4"),
        ({"lag": 0}, "lag=0"),
        ({"ratio": 0.0}, "ratio=0.0"),
        ({"history": [1.0, math.nan]}, r"not finite: 1 \(nan\)"),
    ],
)
def test_early_stopping_rejects_invalid_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        early_stop_epoch(**{"history": [1.0] * 20} | options)
