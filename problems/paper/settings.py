"""The job options of each run of the paper, at the paper's scale and at the laptop scale.

The paper's scale has the sizes of the papers that introduced the search spaces (Liu et al. 2019, Chen et al. 2019, Xu
et al. 2020, and their code) and of section 4.2 of the Learning by Teaching paper. At the laptop scale a run takes half
a minute.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from mlo.options.yaml_options import merge

DataSet = Literal["cifar10", "cifar100", "imagenet"]
Options = Mapping[str, Any]


class Setting(NamedTuple):
    """One run of the paper, at any scale: a method in a search space, with or without a student, on a data set."""

    data: DataSet
    space: str = "darts2"
    student: str | None = None
    judged_by: str = "both"
    student_learns_from: str = "both"
    pseudo_weight: float = 1.0
    student_weight: float = 1.0
    held_out: bool = False
    method: str | None = None

    @property
    def key(self) -> str:
        """The name of the run's folder, unique to these options."""
        words = [self.data, self.method or self.space]
        words += [f"lbt-{self.student}"] if self.student else []
        words += ["student-only"] if self.judged_by == "student" else []
        words += ["pseudo-labels-only"] if self.student_learns_from == "pseudo_labels" else []
        words += [f"lambda-{self.pseudo_weight}"] if self.pseudo_weight != 1 else []
        words += [f"gamma-{self.student_weight}"] if self.student_weight != 1 else []
        words += ["held-out"] if self.held_out else []
        return "-".join(words)

    def options(self, scale: str) -> Options:
        """The options of the run's `lbt` job, without the seed."""
        spaces = LAPTOP_SPACES if scale == "laptop" else PAPER_SPACES
        students = (
            {"rn18": "small", "rn50": "small_wide"} if scale == "laptop" else {"rn18": "resnet18", "rn50": "resnet50"}
        )
        chosen: dict[str, Any] = {"methods": [self.method or ("lbt" if self.student else "plain")]}
        if self.student:
            names = ("judged_by", "student_learns_from", "pseudo_weight", "student_weight")
            chosen |= {"student": students[self.student]} | {name: getattr(self, name) for name in names}
        order = {} if self.space == "darts2" else {"teacher_hypergradient": "first_order"}
        layers = [DATA[scale][self.data], spaces[self.space], order, chosen]
        layers += [HELD_OUT[scale]] if self.held_out else []
        if self.data == "cifar100" and self.space == "pdarts" and scale == "paper":
            layers.append({"search": {"skip_dropout": [0.1, 0.2, 0.3]}})
        if self.data == "imagenet":
            layers.append(IMAGENET_SEARCH[scale])
        return merge_all({"page": scale == "paper"}, *layers)


def merge_all(*layers: Options) -> dict[str, Any]:
    """Merge options; where several set the same option, the last one counts."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = merge(merged, layer)
    return merged


_CROP_AND_FLIP = {"crop": 4, "flip": True}


def _laptop_data(source: str, **changes: Any) -> Options:
    sizes = {"train_size": 1000, "validation_size": 1000, "unlabeled_size": 4000, "test_size": 5000}
    return {"data": {"source": source, "image_size": 12, **sizes, **changes}}


def _paper_data(source: str, **changes: Any) -> Options:
    return {"data": {"source": source, "train_size": 25000, "validation_size": 25000, **changes}}


DATA: Mapping[str, Mapping[DataSet, Options]] = {
    "laptop": {
        "cifar10": _laptop_data("cifar10"),
        "cifar100": _laptop_data("fashion_mnist"),
        "imagenet": _laptop_data("cifar10", image_size=24),
    },
    "paper": {
        "cifar10": _paper_data("cifar10", unlabeled_source="cifar100", unlabeled_size=None),
        "cifar100": _paper_data("cifar100", unlabeled_source="cifar10", unlabeled_size=None),
        "imagenet": {
            "data": {
                "source": "imagenet",
                "image_size": 224,
                "train_size": 128_116,
                "validation_size": 32_029,
                "unlabeled_size": 128_116,
                "workers": 8,
            }
        },
    },
}
"""At the laptop scale Fashion-MNIST replaces CIFAR-100, and CIFAR-10 at 24x24 replaces ImageNet."""

HELD_OUT: Mapping[str, Options] = {
    "laptop": {"data": {"held_out_size": 5000, "test_size": None}},
    "paper": {
        "data": {"held_out_size": 5000, "train_size": 22500, "validation_size": 22500},
        "steps": 50 * (22500 // 64),
        "checkpoint_every": 22500 // 64,
        "evaluation": {"steps": 600 * (45000 // 96)},
    },
}
"""Section 4.4: the trade-offs are compared on 5,000 of the labeled images, which are held out."""


def _laptop(space: str, steps: int = 50, **search: Any) -> Options:
    return {
        "steps": steps,
        "log_every": 10,
        "checkpoint_every": 1000,
        "search": {"space": space, "channels": 4, "cells": 3, "batch_size": 32, **search},
        "evaluation": {"steps": 300, "batch_size": 32},
    }


LAPTOP_SPACES: Mapping[str, Options] = {
    "darts1": _laptop("darts"),
    "darts2": _laptop("darts"),
    "pdarts": _laptop("p_darts", 25, cells=[3, 4, 5], skip_dropout=[0.0, 0.2, 0.4], warmup=10, architecture_clip=5.0),
    "pcdarts": _laptop("pc_darts", warmup=15),
}


def _paper(space: str, epochs: int, batch: int, rates: tuple[float, float, float], **search: Any) -> Options:
    epoch = 25000 // batch
    first, last, architecture = rates
    warmup = search.pop("warmup_epochs", 0) * epoch
    final_batch = 128 if space == "p_darts" else 96
    return {
        "threads": None,
        "steps": epochs * epoch,
        "log_every": 50,
        "checkpoint_every": epoch,
        "search": {
            "space": space,
            "channels": 16,
            "cells": 8,
            "batch_size": batch,
            "learning_rate": first,
            "last_learning_rate": last,
            "architecture_learning_rate": architecture,
            "warmup": warmup,
            "augmentation": _CROP_AND_FLIP,
            **search,
        },
        "evaluation": {
            "channels": 36,
            "cells": 20,
            "batch_size": final_batch,
            "steps": 600 * (50000 // final_batch),
            "learning_rate": 0.025,
            "drop_path": 0.2 if space == "darts" else 0.3,
            "auxiliary": True,
            "images": "everything",
            "augmentation": {**_CROP_AND_FLIP, "cutout": 16},
        },
    }


_P_DARTS = {"cells": [5, 11, 17], "skip_dropout": [0.0, 0.4, 0.7], "architecture_clip": 5.0}
PAPER_SPACES: Mapping[str, Options] = {
    "darts1": _paper("darts", 50, 64, (0.025, 0.001, 3e-4)),
    "darts2": _paper("darts", 50, 64, (0.025, 0.001, 3e-4)),
    "pdarts": _paper("p_darts", 25, 96, (0.025, 0.0, 6e-4), warmup_epochs=10, **_P_DARTS),
    "pcdarts": _paper("pc_darts", 50, 256, (0.1, 0.0, 6e-4), warmup_epochs=15),
}

_IMAGENET_EPOCH = 128_116 // 1024
_IMAGENET_AUGMENTATION = {"crop": 0, "cutout": 0, "resized_crop": True, "flip": True, "jitter": 1.0}


def imagenet_evaluation(scale: str, space: str) -> Options:
    """The options for evaluating an architecture of a space on ImageNet, or on CIFAR-10 at the laptop scale."""
    if scale == "laptop":
        return {"steps": 300, "channels": 8, "cells": 3, "batch_size": 32}
    batch = 128 if space.startswith("darts") else 1024
    return {
        "channels": 48,
        "cells": 14,
        "batch_size": batch,
        "steps": 250 * (1_281_167 // batch),
        "learning_rate": 0.1 if batch == 128 else 0.5,
        "schedule": "exponential" if batch == 128 else "linear",
        "weight_decay": 3e-5,
        "label_smoothing": 0.1,
        "drop_path": 0.0,
        "auxiliary": True,
        "images": "everything",
        "augmentation": _IMAGENET_AUGMENTATION,
    }


IMAGENET_SEARCH: Mapping[str, Options] = {
    "laptop": {"search": {"partial": 2}, "evaluation": imagenet_evaluation("laptop", "pcdarts")},
    "paper": {
        "steps": 50 * _IMAGENET_EPOCH,
        "checkpoint_every": _IMAGENET_EPOCH,
        "search": {
            "partial": 2,
            "batch_size": 1024,
            "learning_rate": 0.5,
            "architecture_learning_rate": 6e-3,
            "warmup": 35 * _IMAGENET_EPOCH,
            "augmentation": _IMAGENET_AUGMENTATION,
        },
        "evaluation": imagenet_evaluation("paper", "pcdarts"),
    },
}
"""PC-DARTS' search on ImageNet itself (Xu et al. 2020, section 4.3)."""


def benefit_options(method: str, student_weight: float = 1.0, judged_by: str = "both") -> Options:
    """The options of a setting in which teaching should help if it ever does, at the laptop scale only.

    The search has few labels (200) and many unlabeled images (8,000). One of the four operations only makes noise.
    Products are exact, since finite differences are noisy. The networks found are trained on many labeled images, so
    that they differ only in their architecture.
    """
    return {
        "methods": [method],
        "student_weight": student_weight,
        "judged_by": judged_by,
        "page": False,
        "hypergradient": "one_step",
        "lookahead": True,
        "steps": 100,
        "log_every": 10,
        "checkpoint_every": 1000,
        "data": {
            "source": "cifar10",
            "image_size": 12,
            "train_size": 100,
            "validation_size": 100,
            "unlabeled_size": 8000,
            "test_size": 5000,
        },
        "search": {
            "operations": ["max_pool_3x3", "skip_connect", "sep_conv_3x3", "noise"],
            "channels": 4,
            "cells": 3,
            "batch_size": 32,
            "augmentation": {"crop": 2, "flip": True},
        },
        "evaluation": {"steps": 300, "batch_size": 64, "images": "everything"},
    }
