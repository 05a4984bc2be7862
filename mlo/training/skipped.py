"""What happens to a round with a loss, gradient or buffer that is not finite: it stops the training, or is skipped."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlo.errors import ConfigError, NonFiniteLossError
from mlo.levels.problem import Problem
from mlo.ops import distributed
from mlo.training.commit import Updater
from mlo.training.gradients import Gradients
from mlo.training.rounds import Rounds
from mlo.training.state_checks import SKIPPED

MOST_IN_A_ROW = 10


class Skipped:
    """Takes rounds. If they may be skipped, one in which something is not finite is undone, but for its batches.

    All parameters, buffers, optimizer states, schedulers, losses and warm starts are then as before the round, and the
    next round takes the next batches. For this each problem is copied before each round, and on a GPU each round waits
    for the device.

    Args:
        policy: "stop" or "skip".

    Attributes:
        total: rounds that were skipped.
        in_a_row: those since the last good one.

    Raises:
        ConfigError: if there is no such policy, or it needs a single process.
    """

    def __init__(
        self, policy: str, problems: Mapping[str, Problem], rounds: Rounds, gradients: Gradients, updater: Updater
    ) -> None:
        if policy not in ("stop", "skip"):
            raise ConfigError(f"non_finite={policy!r}; pass 'stop' or 'skip'")
        if policy == "skip" and distributed.world() > 1:
            raise ConfigError("non_finite='skip' works in one process; pass non_finite='stop' under torchrun")
        self._skips = policy == "skip"
        self._problems, self._rounds, self._gradients, self._updater = problems, rounds, gradients, updater
        self.total = self.in_a_row = 0

    def take(self, one_round: Callable[[], None], due: Sequence[str]) -> None:
        """Take a round of the problems that are ``due``.

        Raises:
            NonFiniteLossError: if it is not skipped, or too many in a row would be.
        """
        if not self._skips:
            one_round()
            return
        before = self._copies()
        try:
            one_round()
            self._updater.wait()
        except NonFiniteLossError as error:
            self._undo(before, due)
            if self.in_a_row == MOST_IN_A_ROW:
                raise NonFiniteLossError(f"{error}. {MOST_IN_A_ROW} rounds in a row were skipped before it") from error
            self.total += 1
            self.in_a_row += 1
        else:
            self.in_a_row = 0

    def _copies(self) -> dict[str, Any]:
        states = {name: problem.state_dict() for name, problem in self._problems.items()}
        for state in states.values():
            del state["data"]
        return copy.deepcopy({"problems": states, "losses": self._rounds.losses, **self._gradients.state_dict()})

    def _undo(self, before: Mapping[str, Any], due: Sequence[str]) -> None:
        """Put everything back, and move on past the batches of the round."""
        for name, problem in self._problems.items():
            state = before["problems"][name]
            left = problem.steps - (problem.step_number - state["steps_taken"]) if name in due else 0
            problem.load_state_dict(state)
            for _ in range(left):
                problem.advance()
        self._rounds.losses = before["losses"]
        self._gradients.load_state_dict(before, self._updater.device)
        self._updater.forget()

    def metrics(self) -> dict[str, float]:
        """How many rounds were skipped, if any can be."""
        return {"skipped_rounds": self.total} if self._skips else {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of it."""
        return {SKIPPED: [self.total, self.in_a_row]} if self._skips else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checked state, of an engine that may have another policy."""
        self.total, self.in_a_row = state.get(SKIPPED, (0, 0))
