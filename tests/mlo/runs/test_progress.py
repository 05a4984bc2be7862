"""What is shown while a stage runs, and how seldom tensors are read for it."""

import io

import pytest
from rich.console import Console

from mlo.runs import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved: clock[0] is the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def show(clock, terminal, seconds_a_step, steps=100):
    """(what was written, at which steps losses were read) of a stage at a steady pace."""
    out, reads = io.StringIO(), []
    console = Console(file=out, force_terminal=terminal, width=100)
    with progress.stage_progress("search", steps, 0, console) as update:
        for step in range(1, steps + 1):
            clock[0] += seconds_a_step
            update(step, lambda step=step: reads.append(step) or {"teacher": 2.5, "student": 1 / 3})
    return out.getvalue(), reads


def test_without_a_terminal_a_line_every_ten_seconds_and_at_the_end(clock):
    text, reads = show(clock, terminal=False, seconds_a_step=0.4)
    assert reads == [25, 50, 75, 100]
    assert text.splitlines()[0] == "search 25/100  0:00:30 left  teacher 2.5  student 0.3333"
    assert text.splitlines()[-1] == "search 100/100  took 0:00:40  teacher 2.5  student 0.3333"


def test_in_a_terminal_losses_are_read_twice_a_second(clock):
    text, reads = show(clock, terminal=True, seconds_a_step=0.125)
    assert reads == list(range(4, 101, 4))
    assert "100/100" in text
    assert "teacher 2.5  student 0.3333" in text


def test_the_time_left_counts_only_the_steps_of_this_process(clock):
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=100)
    with progress.stage_progress("search", 100, 80, console) as update:
        clock[0] += 20
        update(90, dict)
    assert "0:00:20 left" in out.getvalue()
