"""Where in a user's code mlo was called."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_OWN = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


def users_line() -> tuple[str, int, int]:
    """The file and the line of the user's that runs now, and its ``stacklevel`` for a warning of the caller's."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN):
        frame, level = frame.f_back, level + 1
    return frame.f_code.co_filename, frame.f_lineno, level
