"""The measurements for a GPU run on the CPU at a tiny size; a section that fails or hangs does not stop the others."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from two_levels import Following, Judging

import mlo
from benchmarks.gpu import cuda_tests, running, waits
from benchmarks.gpu.report import report
from benchmarks.gpu.running import run_sections
from benchmarks.gpu.sections import SECTIONS, Section
from benchmarks.gpu.session import Session

ROOT = Path(__file__).resolve().parents[2]


def command(*words: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "benchmarks.gpu", *map(str, words)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


def results(folder: Path) -> dict[str, dict]:
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in SECTIONS}


@pytest.mark.processes
@pytest.mark.slow
def test_all_sections_run_on_the_cpu(tmp_path: Path) -> None:
    done = command("--smoke", "--seconds", 250, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(tmp_path)
    assert {of["status"] for of in found.values()} == {"done"}
    assert all("needs a CUDA device" in json.dumps(found[name]) for name in SECTIONS if name != "convolutions")
    assert found["engine"]["float32, captured"] == "skipped: needs a CUDA device"
    assert found["engine"]["float32"]["losses"].keys() == {"teacher/loss", "student/loss", "arch/loss"}
    assert len(found["hand"]["bfloat16"]["losses"]) == 3
    assert all(row["double_backward_us"] > 0 for row in found["convolutions"]["table"])
    assert found["tests"]["cuda"]["exit_code"] == 0
    page = command("--report", "--out", tmp_path).stdout
    assert all(f"### {title}" in page for title in ("A round by the engine", "Tests", "Compiled, on three cells"))
    assert "no meaning as figures" in page


@pytest.mark.processes
def test_some_sections_run_on_the_cpu(tmp_path: Path) -> None:
    done = command("--smoke", "--out", tmp_path, "--sections", "device", "convolutions", "compile")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compile.json", "convolutions.json", "device.json"]
    assert "| depthwise 3x3, 10 channels, 8x8 | float32 | contiguous |" in report(tmp_path)


def use(monkeypatch: pytest.MonkeyPatch, seconds: float = 60.0, **sections: object) -> None:
    """Replace the sections by these functions."""
    made = {}
    for name, function in sections.items():
        monkeypatch.setitem(sys.modules, f"benchmarks.gpu.{name}", SimpleNamespace(measure=function))
        made[name] = Section(name, seconds, "")
    monkeypatch.setattr(running, "SECTIONS", made)


def fail(session: Session) -> None:
    session.note("before", 1)
    raise RuntimeError("no such kernel")


def fail_in_part(session: Session) -> None:
    with session.attempt("one"):
        raise RuntimeError("no such kernel")
    session.note("other", {"round_s": 1.0})


def hang(session: Session) -> None:
    session.note("before", 1)
    time.sleep(100)


def succeed(session: Session) -> None:
    session.note("result", 2)


def test_a_section_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, failing=fail, in_part=fail_in_part, succeeding=succeed)
    statuses = run_sections(["failing", "in_part", "succeeding"], tmp_path, 60.0, smoke=True)
    assert statuses == {
        "failing": "failed, exit code 1",
        "in_part": "failed in part: one",
        "succeeding": "done",
    }
    first = json.loads((tmp_path / "failing.json").read_text())
    assert first["before"] == 1
    assert "no such kernel" in first["failed"]
    assert json.loads((tmp_path / "in_part.json").read_text())["other"] == {"round_s": 1.0}


def test_a_section_that_takes_too_long_is_stopped_and_keeps_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, 0.5, hanging=hang, succeeding=succeed)
    monkeypatch.setattr(running, "GRACE", 0.1)
    begin = time.monotonic()
    statuses = run_sections(["hanging", "succeeding"], tmp_path, 60.0, smoke=True)
    assert statuses["hanging"].startswith("stopped after")
    assert statuses["succeeding"] == "done"
    assert json.loads((tmp_path / "hanging.json").read_text())["before"] == 1
    assert time.monotonic() - begin < 20


def test_a_section_without_time_is_skipped_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, succeeding=succeed)
    assert run_sections(["succeeding"], tmp_path, 5.0, smoke=True)["succeeding"].startswith("skipped: ")
    assert json.loads((tmp_path / "succeeding.json").read_text())["status"] == "skipped: 5 s of 5 s are left"


def test_waits_are_counted_by_the_lines_that_lead_to_them() -> None:
    low, top, batch = nn.Linear(3, 2), nn.Linear(3, 2), torch.randn(4, 3)
    levels = [
        Following("low", module=low, optimizer=torch.optim.SGD(low.parameters(), 0.1), data=[batch]),
        Judging("top", module=top, optimizer=torch.optim.SGD(top.parameters(), 0.1), data=[batch]),
    ]
    engine = mlo.Engine(levels, device="cpu")
    with waits.noted_waits(torch.device("cpu")) as where:
        engine.run(2, [lambda _: warnings.warn("called a synchronizing CUDA operation", stacklevel=1)])
        warnings.warn("something else", stacklevel=1)
    (line,) = where
    assert line.startswith("mlo/training/engine.py:")
    assert where[line] == 2


def test_the_report_has_the_figures_of_a_gpu(tmp_path: Path) -> None:
    rounds = {"round_s": 0.2, "streamed_s": 0.19, "gpu_days": 0.0429, "peak_gib": 9.5}
    profile = {"launches": 44_000, "busy_ms": 150.0, "mean_us": 3.4, "top": [{"name": "a|b", "count": 7, "ms": 1.5}]}
    written = {
        "device": {"name": "NVIDIA H100", "copy_tb_s": 2.9},
        "engine": {
            "TF32": rounds,
            "TF32, captured": {**rounds, "replayed": 21, "not_captured": None},
            "bfloat16": {"failed": "Traceback\nValueError: x"},
            "profile of TF32": profile,
        },
        "hand": {"TF32": {"eager_s": 0.1, "graph_s": 0.05, "gpu_days": 0.0113}},
        "waits": {"waits_a_round": 2.0, "lines": {"mlo/a.py:1": 6}},
        "tests": {"cuda": {"passed": 40, "skipped": 1, "failed": 1, "messages": {"test_x": "no\nkernel"}}},
        "convolutions": {"copy_tb_s": 2.9, "table": []},
        "compile": {"cells": 3, "eager_round_s": 0.1, "compiled_round_s": 0.05},
    }
    for name, of in written.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"smoke": False, "status": "done"} | of))
    page = report(tmp_path)
    for line in (
        "| GPU | NVIDIA H100 |",
        "| TF32 | 0.2 | 0.19 | 0.0429 | 9.5 |  |  |",
        "| TF32, captured | 0.2 | 0.19 | 0.0429 | 9.5 | 21 |  |",
        "| bfloat16 | failed: ValueError: x |  |  |  |  |  |",
        "A round, TF32: 44,000 kernels, 150 ms of kernels, 3.4 µs each. The most expensive:",
        "| `a\\|b` | 7 | 1.5 |",
        "| TF32 | 0.1 | 0.05 | 0.0113 |  |  |",
        "Waits a round: 2.0.",
        "| `cuda` | 40 | 1 | 1 |",
        "- `test_x`: no kernel",
        "| compiled |  |  |  | 0.05 |  |  |  |",
    ):
        assert line in page.splitlines(), page


def test_a_report_without_results_says_what_to_run(tmp_path: Path) -> None:
    done = command("--report", "--out", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: no results in {tmp_path}; measure first: python -m benchmarks.gpu")


def test_the_help_is_one_screen() -> None:
    lines = command("--help").stdout.splitlines()
    assert len(lines) < 40
    assert all(any(line.strip().startswith(name) for line in lines) for name in SECTIONS)


@pytest.mark.processes
@pytest.mark.slow
def test_interrupted_tests_still_report_those_that_ran(tmp_path: Path) -> None:
    bodies = {"passes": "pass", "fails": "assert False, 'wrong'", "hangs": "time.sleep(60)"}
    tests = "".join(f"def test_{name}(): {body}\n" for name, body in bodies.items())
    (tmp_path / "test_it.py").write_text(f"import time\n{tests}")
    written, log = tmp_path / "report.xml", tmp_path / "log"
    line = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-c", "/dev/null"]
    code = cuda_tests.code_of([*line, f"--junitxml={written}", str(tmp_path)], log, 15.0)
    assert code == cuda_tests.INTERRUPTED, log.read_text()
    found = cuda_tests.summary(written)
    assert (found["passed"], found["failed"]) == (1, 1)
    assert "wrong" in found["messages"]["test_it::test_fails"]
