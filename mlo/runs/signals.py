"""Handling of SIGINT (Ctrl-C) and SIGTERM."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def handle_stop_signals(
    handler: Callable[[int, FrameType | None], Any] = signal.default_int_handler,
) -> Iterator[None]:
    """Let a function handle SIGINT and SIGTERM; by default both raise KeyboardInterrupt.

    Outside the main thread, where Python handles no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
