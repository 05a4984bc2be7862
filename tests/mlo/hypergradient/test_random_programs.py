"""Random programs against plain autograd; ``python tests/random_programs.py`` tries as many more as one likes."""

from __future__ import annotations

from itertools import islice

import pytest
from random_programs import IllPosedError, programs, wrong

pytestmark = pytest.mark.filterwarnings("ignore:the gradient of", "ignore:Detected call of `lr_scheduler.step")


def check(first: int, count: int, rounds: int) -> None:
    for program in islice(programs(first), count):
        try:
            faults = wrong(program, rounds)
        except IllPosedError:
            continue
        assert not faults, "\n".join([str(program), *faults])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("first", range(0, 20_000, 1_000))
def test_programs_do_what_plain_autograd_does(first):
    check(first, 10, rounds=1)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("first", range(20_000, 60_000, 1_000))
def test_more_programs_and_rounds(first):
    check(first, 10, rounds=3)
