"""Section `tests`: the tests that are marked `cuda`, then those that also compile kernels, by pytest."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from benchmarks.gpu.session import Session

ROOT = Path(__file__).resolve().parents[2]
MARKS = {"cuda": "cuda and not kernels", "cuda and kernels": "cuda and kernels"}
INTERRUPTED = 2  # the exit code of pytest
TO_WRITE = 4.0  # seconds that pytest has for its report after it was interrupted
ONE_FILE = "tests/problems/data/test_images.py"  # that smoke mode collects


def measure(session: Session) -> None:
    """How many tests passed, and the messages of those that did not."""
    if importlib.util.find_spec("pytest") is None:
        session.note("tests", "skipped: pytest is not installed")
        return
    for name, mark in MARKS.items():
        if session.has_time(name, 0.0 if session.smoke else 10.0):
            share = session.left() * (0.6 if name == "cuda" else 1.0)
            with session.attempt(name):
                session.note(name, _run(session, mark, share - TO_WRITE))
        if session.smoke:
            session.skip("tests are collected, not run")
            break


def _run(session: Session, mark: str, seconds: float) -> dict[str, Any]:
    """Run the tests of a mark in a process, and read what it wrote."""
    stem = mark.replace(" ", "_")
    report, log = (session.folder / f"tests_{stem}{suffix}" for suffix in (".xml", ".log"))
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", mark, "--tb=short", "-rfE"]
    # without --strict-config, since an option of a plug-in that is not installed would be an error
    command += ["-o", "addopts=--import-mode=importlib", f"--junitxml={report}"]
    command += ["--collect-only", ONE_FILE] if session.smoke else ["tests"]
    code = code_of(command, log, seconds)
    if session.smoke and code == 0:
        return {"exit_code": code, "log": _end_of(log, 200)}
    if session.smoke or not report.exists():
        return {"exit_code": code, "failed": _end_of(log)}
    return {"exit_code": code, "interrupted": code == INTERRUPTED, **summary(report)}


def code_of(command: list[str], log: Path, seconds: float) -> int:
    """Run pytest, and interrupt it after these seconds: then it still writes about the tests that it ran."""
    with log.open("w", encoding="utf-8") as file, subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file) as run:
        for end in (lambda: run.send_signal(signal.SIGINT), run.kill):
            try:
                return run.wait(seconds)
            except subprocess.TimeoutExpired:
                end()
                seconds = TO_WRITE
        return run.wait()


def summary(report: Path) -> dict[str, Any]:
    """Counts and messages from a report in JUnit's format."""
    found: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": 0, "messages": {}}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        if case.get("name") is None:  # the test at which pytest was interrupted
            continue
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        kind = "passed" if problem is None else "skipped" if problem.tag == "skipped" else "failed"
        found[kind] += 1
        if problem is not None and kind == "failed":
            name = f"{case.get('classname')}::{case.get('name')}"
            found["messages"][name] = (problem.get("message") or "")[:300]
    return found


def _end_of(log: Path, count: int = 1500) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-count:]
