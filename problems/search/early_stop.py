"""RobustDARTS' early stop: a search ends once its minimum grows sharp, and goes back to where it was not yet."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import mlo
from problems.nas import ArchitectureLogits, Supernet, architecture_loss, dominant_eigenvalue, early_stop_epoch


class Sharpness(nn.Module):
    """What was seen of a search: the validation loss's dominant eigenvalue in the architecture, and the logits there.

    It has no parameters. As a submodule of the architecture's module, ``sharpness``, it is part of that module's state,
    and so of every checkpoint.

    Args:
        every: rounds between two looks.

    Attributes:
        rounds, eigenvalues, logits: of each look; logits as lists, one a kind of cell.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self.rounds: list[int] = []
        self.eigenvalues: list[float] = []
        self.logits: list[dict[str, list[list[float]]]] = []
        self._now = 0

    def look(self, engine: mlo.Engine) -> None:
        """Take the eigenvalue, where one is due in the present round and has not been taken.

        It is that of the teacher's loss on the architecture's next validation batch, in the precision of the weights.
        Nothing of the search changes: neither random state nor the position in the data.
        """
        self._now = engine.rounds
        if self._now % self.every or self._now in self.rounds:
            return
        arch, supernet = engine.problems["arch"], engine.problems["teacher"].module
        assert isinstance(supernet, Supernet)
        images, labels = arch.batches_ahead()[0]
        logits: ArchitectureLogits = arch.module()
        self.eigenvalues.append(dominant_eigenvalue(architecture_loss(supernet, images, labels), logits))
        self.rounds.append(self._now)
        self.logits.append({kind: matrix.tolist() for kind, matrix in logits._asdict().items()})

    def latest(self) -> torch.Tensor | None:
        """The eigenvalue of the present round, a scalar; None where none was due."""
        return torch.tensor(self.eigenvalues[-1]) if self.rounds and self.rounds[-1] == self._now else None

    def earlier(self) -> int | None:
        """Which look to go back to, if the search should end; see :func:`problems.nas.early_stop_epoch`."""
        return early_stop_epoch(self.eigenvalues)

    def get_extra_state(self) -> dict[str, Any]:
        """All looks."""
        return {"rounds": list(self.rounds), "eigenvalues": list(self.eigenvalues), "logits": list(self.logits)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`get_extra_state` returned."""
        self.rounds, self.eigenvalues, self.logits = (list(state[key]) for key in ("rounds", "eigenvalues", "logits"))


def sharpness(engine: mlo.Engine) -> Sharpness | None:
    """What was seen of an engine's search, if it is watched."""
    found = getattr(engine.problems["arch"].module, "sharpness", None)
    assert found is None or isinstance(found, Sharpness)
    return found


def grown_sharp(engine: mlo.Engine) -> bool:
    """Take the eigenvalue if it is due; whether the search should end (the ``stop`` of :meth:`mlo.Run.stage`)."""
    watched = sharpness(engine)
    if watched is None:
        return False
    watched.look(engine)
    return watched.earlier() is not None


def found_by(engine: mlo.Engine) -> dict[str, Any]:
    """The logits that a search ends with, {"normal": rows, "reduce": rows}: its last, or those that it goes back to.

    Where it was watched, with the rounds that it took, and the one that the logits are of.
    """
    watched = sharpness(engine)
    earlier = None if watched is None else watched.earlier()
    if watched is None or earlier is None:
        logits = {kind: matrix.tolist() for kind, matrix in engine.problems["arch"].module()._asdict().items()}
        return logits if watched is None else {**logits, **_rounds(engine.rounds, engine.rounds)}
    return {**watched.logits[earlier], **_rounds(engine.rounds, watched.rounds[earlier])}


def _rounds(taken: int, of_logits: int) -> dict[str, int]:
    return {"search_rounds": taken, "architecture_of_round": of_logits}
