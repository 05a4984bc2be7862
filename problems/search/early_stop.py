"""RobustDARTS' early stop: a search ends when its minimum becomes sharp, and returns an earlier architecture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import mlo
from mlo.ops.tf32 import Tf32
from problems.nas import ArchitectureLogits, Supernet, architecture_loss, dominant_eigenvalue


class Sharpness(nn.Module):
    """Records the sharpness of a search: the dominant eigenvalue of the validation loss's Hessian in the architecture.

    It has no parameters. It is the submodule ``sharpness`` of the architecture's module, so that every checkpoint
    contains the record.

    Args:
        every: rounds between two measurements.

    Attributes:
        rounds, eigenvalues, logits: one entry for each measurement; logits are lists, one for each kind of cell.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self.rounds: list[int] = []
        self.eigenvalues: list[float] = []
        self.logits: list[dict[str, list[list[float]]]] = []
        self._latest: list[float] = []  # that of the current round; no number, which a CUDA graph would hold fixed

    def measure(self, engine: mlo.Engine) -> None:
        """Compute the eigenvalue if this round is due for one and does not have it yet.

        It uses the teacher's loss on the architecture's next validation batch, in the precision of the weights. It
        does not change the search: random state and the position in the data stay as they are.
        """
        now = engine.rounds
        if now % self.every == 0 and now not in self.rounds:
            arch, supernet = engine.problems["arch"], engine.problems["teacher"].module
            assert isinstance(supernet, Supernet)
            images, labels = arch.batches_ahead()[0]
            logits: ArchitectureLogits = arch.module()
            with Tf32().in_call():
                self.eigenvalues.append(dominant_eigenvalue(architecture_loss(supernet, images, labels), logits))
            self.rounds.append(now)
            self.logits.append({kind: matrix.tolist() for kind, matrix in logits._asdict().items()})
        self._latest = self.eigenvalues[-1:] if now in self.rounds[-1:] else []

    def latest(self) -> torch.Tensor | None:
        """The eigenvalue of the current round, a scalar, or None if this round has none."""
        return torch.tensor(self._latest[0]) if self._latest else None

    def entry_to_restore(self) -> int | None:
        """The entry to go back to if the search should end, or None; see :func:`early_stop_epoch`."""
        return early_stop_epoch(self.eigenvalues)

    def get_extra_state(self) -> dict[str, Any]:
        """All entries."""
        return {"rounds": list(self.rounds), "eigenvalues": list(self.eigenvalues), "logits": list(self.logits)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`get_extra_state` returned."""
        self.rounds, self.eigenvalues, self.logits = (list(state[key]) for key in ("rounds", "eigenvalues", "logits"))


def sharpness(engine: mlo.Engine) -> Sharpness | None:
    """The record of an engine's search, or None if its sharpness is not measured."""
    found = getattr(engine.problems["arch"].module, "sharpness", None)
    assert found is None or isinstance(found, Sharpness)
    return found


def should_stop(engine: mlo.Engine) -> bool:
    """Compute the eigenvalue if it is due, and return whether the search should end (``stop`` of `mlo.Run.stage`)."""
    record = sharpness(engine)
    if record is None:
        return False
    record.measure(engine)
    return record.entry_to_restore() is not None


def final_logits(engine: mlo.Engine) -> dict[str, Any]:
    """The logits that a search returns, {"normal": rows, "reduce": rows}: its last ones, or the restored ones.

    If the sharpness was measured, also the number of rounds taken, and the round that the logits come from.
    """
    record = sharpness(engine)
    entry = None if record is None else record.entry_to_restore()
    if record is None or entry is None:
        logits = {kind: matrix.tolist() for kind, matrix in engine.problems["arch"].module()._asdict().items()}
        return logits if record is None else {**logits, **_rounds(engine.rounds, engine.rounds)}
    return {**record.logits[entry], **_rounds(engine.rounds, record.rounds[entry])}


def _rounds(taken: int, of_logits: int) -> dict[str, int]:
    return {"search_rounds": taken, "architecture_of_round": of_logits}


def early_stop_epoch(
    history: Sequence[float], window: int = 5, lag: int = 4, ratio: float = 1.3, first: int = 10
) -> int | None:
    """The early-stopping rule of RobustDARTS (Zela et al. 2020, section 4.3).

    The eigenvalues are averaged over `window` epochs centered at each epoch. Once the mean at an epoch exceeds `ratio`
    times the mean `lag` epochs earlier, the search should stop, and return the genotype of that earlier epoch. With
    the defaults, those of the authors' code, the earliest decision needs 17 entries, and returns epoch 10.

    Args:
        history: :func:`dominant_eigenvalue` after each epoch, starting at epoch 0. If it is computed only every k
            epochs, `lag`, `first` and the result count entries of this list.
        window: the number of epochs to average over; odd.
        lag: the number of epochs between the two means.
        ratio: the increase at which to stop, above 0.
        first: the earliest epoch that may be returned.

    Returns:
        The epoch whose genotype is the result, the earliest if there are several; None if the search should go on.

    Raises:
        ValueError: if an option is invalid, or an entry is not finite.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be an odd number of epochs, not {window}; the mean is centered at an epoch")
    if lag < 1 or first < 0 or not ratio > 0:
        raise ValueError(f"lag={lag}, first={first}, ratio={ratio}: lag must be >= 1, first >= 0 and ratio > 0")
    invalid = [f"{index} ({value})" for index, value in enumerate(history) if not math.isfinite(value)]
    if invalid:
        raise ValueError(f"the eigenvalues of these epochs are not finite: {', '.join(invalid)}")
    half = window // 2

    def mean_around(epoch: int) -> float:
        return math.fsum(history[epoch - half : epoch + half + 1]) / window

    for earlier in range(max(first, half), len(history) - half - lag):
        if mean_around(earlier + lag) > ratio * mean_around(earlier):
            return earlier
    return None
