"""The checkpoints in a stage's folder: which are its own, the newest good one, and which are removed."""

import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlo.errors import CheckpointError
from mlo.runs.keep import Keep, read_scores, write_scores
from mlo.training import checkpoint

NAME = re.compile(r"step-(\d{9,})\.pt")


class Checkpoints:
    """The files step-000000020.pt, step-000000040.pt, ... of a stage, named after the number of rounds.

    Files with other names are the user's: they are neither read nor removed.

    Args:
        folder: the stage's folder.
        identity: of the run and the stage; a checkpoint of another one is not used.
        keep: which old ones are kept.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], keep: Keep | None = None) -> None:
        self._folder, self._identity, self._keep = folder, identity, keep or Keep()

    def save(self, state: Mapping[str, Any], score: float | None = None) -> None:
        """Write a checkpoint of an engine's state, and remove old ones that need not be kept.

        Newer ones stay until the run has overtaken them: they are damaged, or the run would have continued from them.

        Args:
            score: the value of the metric by which the best are kept.
        """
        rounds, scores = state["rounds"], None
        if score is not None:
            scores = {number: value for number, value in read_scores(self._folder).items() if number < rounds}
            scores[rounds] = score if math.isfinite(score) else None
            write_scores(self._folder, scores)  # first, since a run that is killed here takes these rounds again
        checkpoint.save(self._folder / f"step-{rounds:09}.pt", state, self._of(rounds))
        old = {number: file for number, file in self._files().items() if number <= rounds}
        for number in old.keys() - self._keep.kept(old, scores):
            old[number].unlink()

    def newest(self) -> dict[str, Any] | None:
        """The state in the newest good checkpoint; None if there is none. Others are reported.

        Raises:
            CheckpointError: if the only good ones are of another run, or of other options.
        """
        other, files = None, self._files()
        for rounds, file in sorted(files.items(), reverse=True):
            try:
                return checkpoint.load(file, self._of(rounds))
            except CheckpointError as error:
                reason = str(error).removesuffix(checkpoint.EARLIER)
                first = rounds == min(files)
                then = "there is none before it" if first else "the one before it is tried"
                print(f"warning: {reason}; {then}", file=sys.stderr)
                other = error if isinstance(error, checkpoint.OtherRunError) else other
        if other:
            raise CheckpointError(f"{other}; remove it if the stage should start again from its first round")
        return None

    def faults(self) -> dict[Path, str | None]:
        """What is wrong with each checkpoint; None with a good one."""
        found: dict[Path, str | None] = {}
        for rounds, file in sorted(self._files().items()):
            try:
                checkpoint.load(file, self._of(rounds))
                found[file] = None
            except CheckpointError as error:
                found[file] = str(error)
        return found

    def _of(self, rounds: int) -> dict[str, Any]:
        return {**self._identity, "round": rounds}

    def _files(self) -> dict[int, Path]:
        found = {NAME.fullmatch(file.name): file for file in self._folder.glob("step-*.pt") if file.is_file()}
        return {int(match[1]): file for match, file in found.items() if match}
