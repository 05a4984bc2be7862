"""Progress of a stage: a live bar in a terminal, and a plain line every few seconds elsewhere."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

Losses = Callable[[], Mapping[str, float]]

LIVE_SECONDS = 0.5
PLAIN_SECONDS = 10.0


@contextmanager
def stage_progress(
    name: str, total: int, start: int = 0, console: Console | None = None
) -> Iterator[Callable[[int, Losses], None]]:
    """Show a stage's steps, time left and losses.

    Yields a function that sets the number of steps taken. It also gets a function that returns the losses, which is
    called only when something is shown.

    Args:
        name: the stage's name.
        total: number of steps of the whole stage.
        start: steps that earlier processes have taken.
        console: where to show; standard error by default.
    """
    console = console or Console(stderr=True)
    live = console.is_terminal
    started = shown = time.monotonic()
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[losses]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
    )
    with Progress(*columns, console=console, disable=not live, expand=True) as bar:
        task = bar.add_task(name, total=total, completed=start, losses="")

        def update(step: int, losses: Losses) -> None:
            nonlocal shown
            now = time.monotonic()
            if step < total and now - shown < (LIVE_SECONDS if live else PLAIN_SECONDS):
                return
            shown = now
            text = "  ".join(f"{name} {value:.4g}" for name, value in losses().items())
            bar.update(task, completed=step, losses=text)
            if not live:
                spent = now - started
                left = timedelta(seconds=round(spent / max(1, step - start) * (total - step)))
                duration = f"{left} left" if step < total else f"took {timedelta(seconds=round(spent))}"
                console.print(f"{name} {step}/{total}  {duration}  {text}", soft_wrap=True)

        yield update
