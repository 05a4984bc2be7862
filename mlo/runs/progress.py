"""Progress of a stage: a live bar in a terminal, and a plain line every few seconds elsewhere."""

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

Losses = Callable[[], Mapping[str, float]]

LIVE_SECONDS = 0.5
PLAIN_SECONDS = 10.0


class StageProgress:
    """Shows a stage's steps, time left and losses; a context manager.

    Args:
        name: the stage's name.
        total: number of steps of the whole stage.
        start: steps that earlier processes have taken.
        console: where to show; standard error by default.
    """

    def __init__(self, name: str, total: int, start: int = 0, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._name, self._total, self._start = name, total, start
        self._live = self.console.is_terminal
        self._started = self._shown = time.monotonic()
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[losses]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=self.console,
            disable=not self._live,
            expand=True,
        )
        self._task = self._bar.add_task(name, total=total, completed=start, losses="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, step: int, losses: Losses) -> None:
        """Set the number of steps taken; ``losses`` is called only when something is shown."""
        now = time.monotonic()
        last = step == self._total
        if not last and now - self._shown < (LIVE_SECONDS if self._live else PLAIN_SECONDS):
            return
        self._shown = now
        text = "  ".join(f"{name} {value:.4g}" for name, value in losses().items())
        self._bar.update(self._task, completed=step, losses=text)
        if not self._live:
            self.console.print(f"{self._name} {step}/{self._total}  {self._time(step, now)}  {text}", soft_wrap=True)

    def _time(self, step: int, now: float) -> str:
        spent = now - self._started
        if step == self._total:
            return f"took {timedelta(seconds=round(spent))}"
        left = spent / max(1, step - self._start) * (self._total - step)
        return f"{timedelta(seconds=round(left))} left"
