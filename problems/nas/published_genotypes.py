"""Genotypes found by published searches: DARTS, P-DARTS and PC-DARTS."""

from collections.abc import Mapping

from problems.nas.genotype import Genotype

_DATA = {
    # Liu, Simonyan and Yang 2019, arXiv:1806.09055: first-order and second-order search on CIFAR-10.
    "DARTS_V1": {
        "normal": (
            (("sep_conv_3x3", 1), ("sep_conv_3x3", 0)),
            (("skip_connect", 0), ("sep_conv_3x3", 1)),
            (("skip_connect", 0), ("sep_conv_3x3", 1)),
            (("sep_conv_3x3", 0), ("skip_connect", 2)),
        ),
        "reduce": (
            (("max_pool_3x3", 0), ("max_pool_3x3", 1)),
            (("skip_connect", 2), ("max_pool_3x3", 0)),
            (("max_pool_3x3", 0), ("skip_connect", 2)),
            (("skip_connect", 2), ("avg_pool_3x3", 0)),
        ),
    },
    "DARTS_V2": {
        "normal": (
            (("sep_conv_3x3", 0), ("sep_conv_3x3", 1)),
            (("sep_conv_3x3", 0), ("sep_conv_3x3", 1)),
            (("sep_conv_3x3", 1), ("skip_connect", 0)),
            (("skip_connect", 0), ("dil_conv_3x3", 2)),
        ),
        "reduce": (
            (("max_pool_3x3", 0), ("max_pool_3x3", 1)),
            (("skip_connect", 2), ("max_pool_3x3", 1)),
            (("max_pool_3x3", 0), ("skip_connect", 2)),
            (("skip_connect", 2), ("max_pool_3x3", 1)),
        ),
    },
    # Chen, Xie, Wu and Tian 2019, arXiv:1904.12760: searched on CIFAR-10.
    "PDARTS": {
        "normal": (
            (("skip_connect", 0), ("dil_conv_3x3", 1)),
            (("skip_connect", 0), ("sep_conv_3x3", 1)),
            (("sep_conv_3x3", 1), ("sep_conv_3x3", 3)),
            (("sep_conv_3x3", 0), ("dil_conv_5x5", 4)),
        ),
        "reduce": (
            (("avg_pool_3x3", 0), ("sep_conv_5x5", 1)),
            (("sep_conv_3x3", 0), ("dil_conv_5x5", 2)),
            (("max_pool_3x3", 0), ("dil_conv_3x3", 1)),
            (("dil_conv_3x3", 1), ("dil_conv_5x5", 3)),
        ),
    },
    # Xu, Xie, Zhang, Chen, Qi, Tian and Xiong 2020, arXiv:1907.05737: searched on CIFAR-10 and on ImageNet.
    "PC_DARTS_cifar": {
        "normal": (
            (("sep_conv_3x3", 1), ("skip_connect", 0)),
            (("sep_conv_3x3", 0), ("dil_conv_3x3", 1)),
            (("sep_conv_5x5", 0), ("sep_conv_3x3", 1)),
            (("avg_pool_3x3", 0), ("dil_conv_3x3", 1)),
        ),
        "reduce": (
            (("sep_conv_5x5", 1), ("max_pool_3x3", 0)),
            (("sep_conv_5x5", 1), ("sep_conv_5x5", 2)),
            (("sep_conv_3x3", 0), ("sep_conv_3x3", 3)),
            (("sep_conv_3x3", 1), ("sep_conv_3x3", 2)),
        ),
    },
    "PC_DARTS_image": {
        "normal": (
            (("skip_connect", 1), ("sep_conv_3x3", 0)),
            (("sep_conv_3x3", 0), ("skip_connect", 1)),
            (("sep_conv_3x3", 1), ("sep_conv_3x3", 3)),
            (("sep_conv_3x3", 1), ("dil_conv_5x5", 4)),
        ),
        "reduce": (
            (("sep_conv_3x3", 0), ("skip_connect", 1)),
            (("dil_conv_5x5", 2), ("max_pool_3x3", 1)),
            (("sep_conv_3x3", 2), ("sep_conv_3x3", 1)),
            (("sep_conv_5x5", 0), ("sep_conv_3x3", 3)),
        ),
    },
}

PUBLISHED: Mapping[str, Genotype] = {name: Genotype.model_validate(cells) for name, cells in _DATA.items()}
"""Published genotypes by name."""
