"""The file of metrics of a long stage: it grows slowly, is read in parts, and is cut at its end."""

import json
import subprocess
import sys

import pytest

from mlo.runs import metrics
from mlo.runs.metrics import MANY, cut_metrics, is_logged, read_metrics


def write(stage, lines):
    (stage / "metrics.jsonl").write_bytes(b"".join(lines))
    return stage


def line(step, **more):
    return json.dumps({"step": step, "loss": 1 / (step + 1), **more}).encode() + b"\n"


@pytest.mark.parametrize("every", [1, 7])
def test_a_stage_logs_all_lines_until_there_are_many_and_then_fewer(monkeypatch, every):
    monkeypatch.setattr(metrics, "MANY", 10)
    logged = [step // every for step in range(1, 80 * every) if is_logged(step, every)]
    assert logged == [*range(1, 10), *range(10, 20, 2), *range(20, 40, 4), *range(40, 80, 8)]


def test_two_million_lines_become_less_than_a_fifth():
    assert sum(is_logged(step, 1) for step in range(2_000_000)) < 4 * MANY


def test_a_thinned_reading_keeps_rare_values_and_the_last_line(tmp_path):
    every = [line(step, **({"eigenvalue": step} if step % 100 == 3 else {})) for step in range(1000)]
    found = read_metrics(write(tmp_path, every), 10)
    assert 10 <= len(found) <= 11
    assert sum("eigenvalue" in values for values in found) >= 9
    assert found[-1]["step"] == 999
    assert [values["step"] for values in found] == sorted(values["step"] for values in found)
    for most in (1000, 5000, None):
        assert [values["step"] for values in read_metrics(tmp_path, most)] == list(range(1000))
    assert len(read_metrics(tmp_path, 1)) <= 2
    assert read_metrics(write(tmp_path, []), 5) == []


@pytest.mark.parametrize("tail", [1, 64, 2**20])
@pytest.mark.parametrize("end", [b"", b'{"step": 51, "lo', b"\xff\n", b"\n", b'"x"\n{"step"'])
def test_lines_after_a_checkpoint_are_cut_from_the_end(tmp_path, monkeypatch, tail, end):
    monkeypatch.setattr(metrics, "TAIL", tail)
    every = [line(step) for step in range(1, 51)]
    for rounds in (0, 1, 30, 49, 50, 99):
        write(tmp_path, [*every, end])
        cut_metrics(tmp_path, rounds)
        assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(every[:rounds])
    damaged = [*every[:20], b"\x00\x00\n", *every[21:]]
    cut_metrics(write(tmp_path, [*damaged, end]), 30)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(damaged[:30])
    cut_metrics(write(tmp_path, [end]), 30)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


READ = """
import resource, sys, time
from pathlib import Path
from mlo.runs.metrics import read_metrics, cut_metrics
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
assert len(read_metrics(Path(sys.argv[1]), 2000)) <= 2001
cut_metrics(Path(sys.argv[1]), 2 * 10**6 - 5)
print(time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_two_million_lines_are_read_in_seconds_and_little_memory(tmp_path):
    with (tmp_path / "metrics.jsonl").open("wb") as file:
        for step in range(1, 2_000_001):
            file.write(
                b'{"step": %d, "teacher/loss": 2.3025%d, "student/loss": 1.25, "arch/loss": 0.5}\n' % (step, step)
            )
    words = [sys.executable, "-c", READ, str(tmp_path)]
    seconds, kilobytes = map(float, subprocess.run(words, capture_output=True, check=True, text=True).stdout.split())
    assert seconds < 5
    assert kilobytes < 50_000
