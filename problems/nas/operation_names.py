"""The candidate operations by name, apart from their modules: spaces and genotypes are checked without torch."""

import difflib

NONE = "none"
"""The operation that contributes zero. It is a choice for the architecture, never a module."""

NOISE = "noise"
"""The operation that forgets its input: standard normal noise. Of no use to a network, and no part of `OPERATIONS`."""

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
"""Every operation that has a module: those that a genotype may hold, and a space beside "none"."""

OPERATIONS: tuple[str, ...] = (NONE, *(name for name in BUILDABLE if name != NOISE))
"""The eight operations of the DARTS search space, in its order."""


def explain_unknown(name: str) -> str:
    """Say that `name` is no operation that can be built, with the nearest that is and all the others."""
    valid = f"(valid: {', '.join(BUILDABLE)})"
    if name == NONE:
        return f"{NONE!r} stands for the absence of an edge, and cannot be chosen {valid}"
    nearest = difflib.get_close_matches(name, BUILDABLE, n=1, cutoff=0.0)[0]
    return f"{name!r} is not an operation; the nearest is {nearest!r} {valid}"
