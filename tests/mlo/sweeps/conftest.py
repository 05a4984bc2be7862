"""A sweep without processes, for tests of what happens around them."""

from contextlib import redirect_stdout
from pathlib import Path

import pytest

from mlo.errors import ConfigError, MloError
from mlo.runs.folder import RunFolder
from mlo.sweeps import cost, grid
from mlo.sweeps.processes import Failure


@pytest.fixture
def same_process(monkeypatch):
    """Do what the processes of a sweep would do in this process, one after another, which saves their start."""

    def run(words):
        if words[0] == "mlo.sweeps.cost":
            cost.main(Path(words[1]))
        else:
            assert words[:2] == ["mlo", "resume"]
            RunFolder.open(Path(words[-1])).execute()

    def run_processes(items, command, workers=1, one_core_each=False):
        for item in items:
            try:
                started = command(item)
            except MloError as error:
                yield item, Failure(str(error))
                continue
            try:
                with started.log.open("a") as log, redirect_stdout(log):
                    run(started.words)
            except MloError as error:
                yield item, Failure(str(error), isinstance(error, ConfigError))
            except (ArithmeticError, RuntimeError) as error:
                yield item, Failure(f"{type(error).__name__}: {error}")
            else:
                yield item, None

    for module in (grid, cost):
        monkeypatch.setattr(module, "run_processes", run_processes)
