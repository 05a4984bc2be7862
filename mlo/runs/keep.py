"""Which checkpoints of a stage are kept: the last ones, some in between, and the best by a metric."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from mlo.files import write_atomic
from mlo.options.config import Config

SCORES = "scores.json"


class Keep(Config):
    """Options of a job; a checkpoint is kept if one of them keeps it."""

    last: int = Field(2, ge=1, description="how many of the newest checkpoints to keep; 2 survive damage of one")
    every: int | None = Field(None, ge=1, description="also keep those of every so many rounds, if they are written")
    best: int = Field(0, ge=0, description="also keep so many with the lowest values of the metric `keep.by`")
    by: str | None = Field(None, description="a metric of metrics.jsonl, such as train/loss, for `keep.best`")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.best) != (self.by is not None):
            raise ValueError("best: it needs by, and by needs best; write both, such as best: 3 and by: train/loss")
        return self

    def kept(self, rounds: Iterable[int], scores: Mapping[int, float | None] | None) -> set[int]:
        """Those of the rounds whose checkpoints are kept; the earlier one of two equally good ones.

        Args:
            rounds: of all checkpoints.
            scores: values of the metric, None for one that is not finite. Checkpoints whose scores were lost are kept,
                since they may be the best. None if the stage has no such metric.
        """
        every = sorted(rounds)
        found = {number for number in every if self.every and number % self.every == 0} | {*every[-self.last :]}
        if scores is not None:
            known = [(score, number) for number in every if (score := scores.get(number)) is not None]
            found |= {number for _, number in sorted(known)[: self.best]} | ({*every} - scores.keys())
        return found


def read_scores(stage: Path) -> dict[int, float | None]:
    """{rounds: value of the metric} of checkpoints in a stage's folder; empty if there are none, or damaged."""
    try:
        found = json.loads((stage / SCORES).read_text(encoding="utf-8"))
        return {int(rounds): None if value is None else _finite(value) for rounds, value in found.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return {}


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("not a score")
    return float(value)


def write_scores(stage: Path, scores: Mapping[int, float | None]) -> None:
    """Write what :func:`read_scores` reads.

    Raises:
        OSError: if it cannot be written.
    """
    write_atomic(stage / SCORES, json.dumps({str(rounds): value for rounds, value in sorted(scores.items())}) + "\n")
