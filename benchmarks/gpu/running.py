"""Runs sections one after another, each in its own process and within its time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.session import Session

GRACE = 3.0  # seconds for a section to end by itself before it is stopped
LEAST = 8.0  # seconds, to begin a section with


def run_sections(names: Sequence[str], folder: Path, total: float, smoke: bool) -> dict[str, str]:
    """Run the sections, and return the status of each: "done", "skipped ...", "failed ..." or "stopped ...".

    A section gets its own time, or what is left of the total. If less than 8 seconds are left, it is skipped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end, statuses = time.monotonic() + total, {}
    for name in names:
        section, left = SECTIONS[name], end - time.monotonic()
        session = Session(name, folder, min(section.seconds, left) - GRACE, smoke)
        if left < LEAST:
            statuses[name] = f"skipped: {max(left, 0):.0f} s of {total:.0f} s are left"
            session.note("status", statuses[name])
            continue
        print(f"== {name}: at most {min(section.seconds, left):.0f} s", flush=True)
        session.write()
        statuses[name] = _in_process(session, section.module)
    return statuses


def _in_process(session: Session, module: str) -> str:
    """Run a section in a process of its own, and kill it with all that it started if it does not end in time."""
    # a forked process has torch imported; here nothing has used a GPU yet, so the new process can
    process = multiprocessing.get_context("fork").Process(target=_child, args=(session, module))
    process.start()
    process.join(session.seconds + GRACE)
    if process.is_alive():
        _end(process.pid)
        process.join()
        return _finish(session, f"stopped after {session.seconds + GRACE:.0f} s")
    return _finish(session, "done" if process.exitcode == 0 else f"failed, exit code {process.exitcode}")


def _child(session: Session, module: str) -> None:
    os.setsid()  # so that it can be ended with the processes that it starts
    session.restart()
    try:
        measure: Callable[[Session], None] = import_module(f"benchmarks.gpu.{module}").measure
        measure(session)
    except BaseException:
        session.note("failed", traceback.format_exc()[-3000:])
        raise


def _end(pid: int | None) -> None:
    try:
        os.killpg(pid or 0, signal.SIGKILL)
    except ProcessLookupError:  # it ended in this moment, or has no group yet
        return


def _finish(session: Session, status: str) -> str:
    """Add the status to what the process wrote."""
    session.read()
    if status == "done" and session.failures:
        status = f"failed in part: {', '.join(session.failures)}"
    session.note("status", status)
    return status
