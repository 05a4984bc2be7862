"""A sweep without processes, for tests of what happens around them."""

from contextlib import redirect_stdout
from pathlib import Path

import pytest

from mlo.errors import ConfigError, MloError
from mlo.runs.run import Run
from mlo.sweeps import cost, grid
from mlo.sweeps.processes import Failure, error_message


@pytest.fixture
def same_process(monkeypatch):
    """Do what the processes of a sweep would do in this process, one after another, which saves their start."""

    def run(words):
        if words[0] == "mlo.sweeps.cost":
            cost.main(Path(words[1]))
        else:
            assert words[:2] == ["mlo", "resume"]
            Run.open(Path(words[-1])).execute()

    def run_processes(items, command, ended, workers=1, one_core_each=False):
        for item in items:
            failure = None
            try:
                words, log = command(item)
                try:
                    with log.open("a") as file, redirect_stdout(file):
                        run(words)
                except MloError as error:
                    failure = Failure(str(error), refused=isinstance(error, ConfigError))
                except SystemExit as error:
                    failure = Failure(error_message(str(error)))
                except (ArithmeticError, RuntimeError) as error:
                    failure = Failure(f"{type(error).__name__}: {error}")
            except MloError as error:
                failure = Failure(str(error))
            ended(item, failure)

    for module in (grid, cost):
        monkeypatch.setattr(module, "run_processes", run_processes)
