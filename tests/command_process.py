"""The command `mlo` in a process of its own that starts quickly: its packages are imported once for all such processes.

Like `python -m mlo WORDS`, but forked from a server that has imported the packages of others (none of ours).
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ["torch", "torch._dynamo", "torchvision", "sklearn", "scipy", "matplotlib.figure", "typer", "yaml"]
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(PACKAGES)


def _run(words: Sequence[str], folder: str, path: Sequence[str], hidden: Sequence[str], out: str, err: str) -> None:
    for name, number in ((out, 1), (err, 2)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False, buffering=1) for number in (1, 2))
    os.chdir(folder)
    sys.path[:0] = path
    for name in [*hidden, *sys.modules]:
        if name.partition(".")[0] in hidden:
            sys.modules[name] = None  # importing it is a ModuleNotFoundError
    sys.argv = ["mlo", *words]
    from mlo.__main__ import main

    main()


class CommandProcess:
    """`mlo WORDS` in ``folder``; ``path`` is searched for modules first, and the packages ``hidden`` are not found."""

    def __init__(
        self, *words: object, folder: Path, logs: Path, path: Sequence[object] = (), hidden: Sequence[str] = ()
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._out, self._err = logs / "out.txt", logs / "err.txt"
        given = [str(word) for word in words], str(folder), [str(site) for site in path], list(hidden)
        self._process = server.Process(target=_run, args=(*given, str(self._out), str(self._err)))
        self._process.start()

    @property
    def code(self) -> int | None:
        """The exit code, -N after signal N; None while it runs."""
        return self._process.exitcode

    def wait_until(self, reached) -> None:
        """Wait while it runs until ``reached()`` is true."""
        deadline = time.monotonic() + 120
        while not reached():
            assert self.code is None, self.output()
            assert time.monotonic() < deadline
            time.sleep(0.01)  # a busy wait would take a core from it

    def send(self, number: int) -> tuple[str, str]:
        """Send a signal, and give what `output` does."""
        os.kill(self._process.pid, number)
        return self.output()

    def output(self, timeout: float = 250) -> tuple[str, str]:
        """Wait for the end; (standard output, standard error)."""
        self._process.join(timeout)
        assert self.code is not None
        return self._out.read_text(), self._err.read_text()
