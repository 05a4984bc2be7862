"""What can go wrong that a user can mend: one small family of exceptions."""


class MloError(Exception):
    """Base of every error that mlo raises on purpose; its text names the fault, the place and the remedy."""


class GraphError(MloError):
    """The problems do not fit together: a name, a read or a gradient is missing or in the wrong place."""


class ConfigError(MloError):
    """An option, an optimizer, a data source or a file is not what is needed."""


class CheckpointError(MloError):
    """A checkpoint cannot be written, read or fitted to the run that asks for it."""


class HypergradientError(MloError):
    """A hypergradient is not the derivative that it should be."""


class ProcessError(MloError):
    """Another of the processes that train together has ended."""


class NonFiniteLossError(MloError):
    """A loss came out as NaN or infinity; the step was not taken."""
