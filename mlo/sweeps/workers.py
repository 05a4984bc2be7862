"""Work done in local processes that live on from one piece to the next: what fails or dies takes no other with it."""

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.synchronize import Event
from typing import Any, Generic, TypeVar

from mlo.errors import ConfigError, MloError

Item = TypeVar("Item")
Value = TypeVar("Value")
SPAWN = get_context("spawn")
HELD_BACK = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Failed:
    """A piece of work that ended in an error.

    Attributes:
        message: what went wrong, in words.
    """

    message: str


def in_processes(
    function: Callable[[Item], Value], items: Sequence[Item], workers: int = 1, one_core_each: bool = False
) -> Generator[tuple[Item, Value | Failed], None, None]:
    """Call a function on each item in processes of their own; yields (item, outcome) as they get done.

    A call that raises, or whose process dies, is a :class:`Failed`. Function, items and values are sent by pickle,
    so a script that calls this does so under ``if __name__ == "__main__":``.

    Args:
        function: what to do with an item; it meets Ctrl-C and SIGTERM as a KeyboardInterrupt.
        items: what is to be done, in this order.
        workers: how many processes.
        one_core_each: keep each process on a core of its own, with one thread.

    Raises:
        ConfigError: if there are fewer cores than workers.
        KeyboardInterrupt: after all have stopped, if a SIGINT or SIGTERM came.
    """
    cores = own_cores(workers) if one_core_each else [None] * workers
    stop = SPAWN.Event()
    pool: list[_Worker[Item, Value]] = [_Worker(core, stop) for core in cores[: len(items)]]
    waiting = list(reversed(items))
    busy: dict[Future[Any], tuple[_Worker[Item, Value], Item]] = {}
    try:
        with _passed_on(stop, pool):
            while busy or (waiting and not stop.is_set()):
                for worker in [worker for worker in pool if not worker.busy]:
                    if waiting and not stop.is_set():
                        item = waiting.pop()
                        busy[worker.submit(function, item)] = worker, item
                done, _ = wait(busy, return_when=FIRST_COMPLETED)
                for future in done:
                    worker, item = busy.pop(future)
                    outcome = worker.outcome(future)
                    if not isinstance(outcome, _Stopped):
                        yield item, outcome
                    elif not stop.is_set():
                        yield item, Failed("it was stopped from outside")
        if stop.is_set():
            raise KeyboardInterrupt
    finally:
        for worker in pool:
            worker.close()


def own_cores(workers: int) -> list[int | None]:
    """A core for each worker.

    Raises:
        ConfigError: if there are too few, or the system does not let a process be kept on one.
    """
    if not hasattr(os, "sched_getaffinity"):
        raise ConfigError("one core each: this system does not let a process be kept on a core; leave the option out")
    cores = sorted(os.sched_getaffinity(0))
    if workers > len(cores):
        raise ConfigError(f"one core each: {workers} workers, but {len(cores)} cores; give fewer workers")
    return [*cores[:workers]]


class _Stopped:
    """The outcome of what was interrupted, or not begun."""


class _Worker(Generic[Item, Value]):
    """A pool of one process, so that it is known which piece of work a process died of; a dead one is replaced."""

    def __init__(self, core: int | None, stop: Event) -> None:
        self.busy = False
        self._core, self._stop = core, stop
        self._pool: ProcessPoolExecutor | None = None
        self._pid: Future[int] | None = None

    def submit(self, function: Callable[[Item], Value], item: Item) -> "Future[Value | Failed | _Stopped]":
        self.busy = True
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, SPAWN, initializer=_begin, initargs=(self._core, self._stop))
            with _spawning(single_threaded=self._core is not None):
                self._pid = self._pool.submit(os.getpid)
        return self._pool.submit(_guarded, function, item)

    def outcome(self, future: "Future[Value | Failed | _Stopped]") -> "Value | Failed | _Stopped":
        self.busy = False
        try:
            return future.result()
        except BrokenProcessPool:
            self.close()
            return Failed("its process died (killed, out of memory, or crashed in native code)")
        except Exception as error:  # noqa: BLE001  what cannot be sent between processes; told as what it is
            return Failed(told(error))

    def interrupt(self) -> None:
        if self._pid and self._pid.done() and not self._pid.exception():
            try:
                os.kill(self._pid.result(), signal.SIGUSR1)
            except ProcessLookupError:
                return

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown()
        self._pool = self._pid = None


@contextmanager
def _passed_on(stop: Event, pool: Sequence["_Worker[Any, Any]"]) -> Iterator[None]:
    """Have SIGINT and SIGTERM stop the workers, which write checkpoints; a second signal stops them at once."""

    def take(number: int, frame: Any) -> None:
        stop.set()
        for worker in pool:
            worker.interrupt()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, take) for number in HELD_BACK}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _spawning(single_threaded: bool) -> Iterator[None]:
    """Start processes that no signal of the terminal or of a scheduler reaches: they would get it twice."""
    before = os.environ.get("OMP_NUM_THREADS")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    if single_threaded:
        os.environ["OMP_NUM_THREADS"] = "1"  # read when torch and NumPy are imported
    try:
        yield
    finally:
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
        elif single_threaded:
            del os.environ["OMP_NUM_THREADS"]
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


_stop: list[Event] = []


def _begin(core: int | None, stop: Event) -> None:
    """Prepare a worker process."""
    _stop[:] = [stop]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, _as_sigterm)
    if core is not None:
        os.sched_setaffinity(0, {core})
    os.register_at_fork(after_in_child=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _as_sigterm(number: int, frame: Any) -> None:
    """The parent's word to stop goes where the SIGTERM goes that is kept from this process."""
    handler = signal.getsignal(signal.SIGTERM)
    if callable(handler):
        handler(signal.SIGTERM, frame)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent
    connection.wait([parent.sentinel])
    os._exit(1)


def _guarded(function: Callable[[Item], Value], item: Item) -> Value | Failed | _Stopped:
    try:
        try:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            return _Stopped() if _stop[0].is_set() else function(item)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except KeyboardInterrupt:
        return _Stopped()
    except BaseException as error:  # noqa: BLE001  SystemExit too: whatever ends one piece of work, the rest goes on
        return Failed(told(error))


def told(error: BaseException) -> str:
    """An error in words; its type too, where it is none of ours."""
    return str(error) if isinstance(error, MloError) else f"{type(error).__name__}: {error}"
