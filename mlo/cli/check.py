"""The command `mlo check`."""

from pathlib import Path
from typing import Annotated

import typer


def check(folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of the run.")]) -> None:
    """Verify the files of a run without resuming it.

    Shows which files are damaged, and when the run was last alive. The exit code is 1 if a file is damaged.
    """
    from mlo.runs.check import check_folder, last_alive
    from mlo.runs.folder import RESULTS

    damaged = False
    for file, fault in check_folder(folder):
        damaged |= fault is not None
        print(f"good     {file}" if fault is None else f"DAMAGED  {fault}")
    alive = last_alive(folder)
    print("finished" if (folder / RESULTS).exists() else "not finished", end="")
    print(f", last alive {alive:%Y-%m-%d %H:%M:%S}" if alive else "")
    raise typer.Exit(damaged)
