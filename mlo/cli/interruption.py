"""How Ctrl-C and SIGTERM end a command: with one line, and exit code 130."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from mlo.ops import distributed
from mlo.runs.signals import handle_stop_signals


class StoppableCommands(TyperGroup):
    """The commands; Ctrl-C ends each of them with one line."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if distributed.is_main():
                print("stopped", file=sys.stderr)
            raise typer.Exit(130) from None


@contextmanager
def stoppable(command: str) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the command with a line that says which command continues."""
    try:
        with handle_stop_signals():
            yield
    except KeyboardInterrupt:
        if distributed.is_main():
            print(f"stopped; continue with: {command}", file=sys.stderr)
        raise typer.Exit(130) from None
