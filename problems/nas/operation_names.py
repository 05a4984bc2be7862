"""The names of the candidate operations. They are apart from the modules so that options are checked without torch."""

import difflib

NONE = "none"
"""The operation that contributes zero: it stands for the absence of an edge, and has no module."""

NOISE = "noise"
"""The operation that replaces its input with standard normal noise. It is useless, and not part of `OPERATIONS`."""

BUILDABLE: tuple[str, ...] = (
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
    NOISE,
)
"""The names of all operations that have a module. Genotypes may contain these; search spaces also "none"."""

OPERATIONS: tuple[str, ...] = (NONE, *(name for name in BUILDABLE if name != NOISE))
"""The eight operations of the DARTS search space, in its order."""


def explain_unknown(name: str) -> str:
    """The message for an operation that cannot be built: the nearest valid name, and all of them."""
    valid = f"(valid: {', '.join(BUILDABLE)})"
    if name == NONE:
        return f"{NONE!r} means the absence of an edge and cannot be used as an operation here {valid}"
    nearest = difflib.get_close_matches(name, BUILDABLE, n=1, cutoff=0.0)[0]
    return f"{name!r} is not an operation; the nearest is {nearest!r} {valid}"
