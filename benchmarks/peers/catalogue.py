"""The workloads, estimators and libraries that are measured. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

#: the number of products of the implicit estimators, and of terms of the series
ITERATIONS = 10
#: the same for the language model, whose products are expensive
LANGUAGE_ITERATIONS = 5

#: {workload: its description}
WORKLOADS = {
    "mwn": "(a) Meta-weight-net: MLP 784-256-10, batch 100, one round (a step of the model, a step of the weight net)",
    "clean512": "(b) Hyper-cleaning: MLP 784-256-10, N = 512 sample weights, T = 20 steps of SGD, one hypergradient",
    "clean8192": "(b) Hyper-cleaning: MLP 784-256-10, N = 8192 sample weights, T = 36 steps of SGD, one hypergradient",
    "lbt": "(c) LBT: two small convolutional networks with batch norm and an architecture, one round of all levels",
    "tiny": "(d) Hyper-cleaning: MLP 16-16-10, N = 32 sample weights, T = 20 steps of SGD, one hypergradient",
    "gpt": "(e) GPT: 10.9 million parameters, N = 64 weights, one round (a step of AdamW, a step of the weights)",
    "gpt4": "(e) GPT: 10.9 million parameters, N = 64 weights, T = 4 steps of AdamW, one hypergradient",
}

#: {estimator: the reference that its hypergradient is compared to}; see reference.py
REFERENCES = {
    "darts": "one_step",
    "one_step": "one_step",
    "unrolled": "unrolled",
    "kept": "unrolled",
    "recomputed": "unrolled",
    "product": "product",
    "sama": "sama",
    "cg": "cg",
    "neumann": "neumann",
}

ESTIMATORS = {
    "mwn": ("one_step", "darts", "cg", "neumann"),
    "clean512": ("unrolled", "recomputed", "cg", "neumann", "product"),
    "clean8192": ("unrolled", "kept", "recomputed"),
    "lbt": ("one_step", "darts"),
    "tiny": ("unrolled", "recomputed"),
    "gpt": ("one_step", "darts", "sama", "cg"),
    "gpt4": ("unrolled", "kept", "recomputed"),
}

LIBRARIES = ("hand", "jax", "mlo", "compiled", "betty", "torchopt", "higher", "boat")

TITLES = {
    "hand": "by hand",
    "jax": "by hand, JAX 0.10.2",
    "mlo": "**mlo**",
    "compiled": "**mlo**, compiled",
    "betty": "Betty 0.2.1",
    "torchopt": "TorchOpt 0.7.3",
    "higher": "higher 0.2.1",
    "boat": "BOAT 1.1.1",
}

#: {library: the estimators it has}
OFFERED = {
    "hand": ("one_step", "darts", "sama", "cg", "neumann", "unrolled", "kept", "recomputed", "product"),
    "jax": ("one_step", "darts", "cg", "neumann", "unrolled", "recomputed", "product"),
    "mlo": ("one_step", "darts", "sama", "cg", "neumann", "unrolled", "kept", "recomputed", "product"),
    "compiled": ("one_step", "darts", "sama", "cg", "neumann", "unrolled", "recomputed", "product"),
    "betty": ("darts", "cg", "neumann", "unrolled"),
    "torchopt": ("one_step", "cg", "neumann", "unrolled"),
    "higher": ("one_step", "unrolled"),
    "boat": ("one_step", "darts", "cg", "neumann", "unrolled"),
}

#: {(workload, library): why the library cannot express the workload}
REFUSED = {("lbt", "boat"): "two levels only"}

#: {workload: the only libraries that are measured on it}
ONLY = dict.fromkeys(("gpt", "gpt4"), ("hand", "mlo", "compiled"))

#: {workload: the environment of all its rows}, where the workload itself needs packages; see environments.py
ENVIRONMENTS = dict.fromkeys(("gpt", "gpt4"), "transformers")

#: not libraries for bilevel optimization, but loops written by hand
BY_HAND = ("hand", "jax")


@dataclass(frozen=True)
class Case:
    """One row of the tables."""

    workload: str
    library: str
    estimator: str

    @property
    def name(self) -> str:
        """The name of the row's file."""
        return f"{self.workload}-{self.estimator}-{self.library}"

    @property
    def environment(self) -> str:
        """The environment that runs it; see environments.py."""
        return ENVIRONMENTS.get(self.workload, self.library)


def cases(workload: str | None = None, library: str | None = None) -> list[Case]:
    """All rows, or only those of one workload or one library."""
    return [
        Case(w, lib, estimator)
        for w in WORKLOADS
        for estimator in ESTIMATORS[w]
        for lib in LIBRARIES
        if workload in (None, w)
        and library in (None, lib)
        and estimator in OFFERED[lib]
        and lib in ONLY.get(w, LIBRARIES)
    ]
