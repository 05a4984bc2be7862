"""The exceptions that mlo raises for mistakes a user can correct."""

LONGEST = 2000  # characters of a line


class MloError(Exception):
    """Base class of all errors that mlo raises on purpose. The message says what is wrong, where, and what to write."""


class GraphError(MloError):
    """The problems do not form a valid graph: a name, a read or a gradient is missing or wrong."""


class ConfigError(MloError):
    """An option, an optimizer, a data source or a file is invalid."""


class CheckpointError(MloError):
    """A checkpoint cannot be written, cannot be read, or does not match the run."""


class HypergradientError(MloError):
    """A hypergradient differs from the derivative that it should be equal to."""


class InconclusiveError(MloError):
    """A check can neither confirm a hypergradient nor refute it."""


class ProcessError(MloError):
    """Another process of a distributed run has ended."""


class NonFiniteLossError(MloError):
    """A loss or its gradient is NaN or infinite. The step was not taken."""


def brief(message: str) -> str:
    """A message for the command line, with its longest lines cut: they quote what the user gave."""
    cut = [line if len(line) <= LONGEST else f"{line[:LONGEST]} ..." for line in message.splitlines()]
    return "\n".join(cut)
