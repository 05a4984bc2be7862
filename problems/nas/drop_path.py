"""Drop-path: in training, an edge of the evaluation network outputs zero for some of the samples."""

import torch
from torch import Tensor


def apply_drop_path(features: Tensor, probability: float | Tensor) -> Tensor:
    """Set each sample of (N, C, H, W) to zero with `probability`, and divide the others by 1 - `probability`.

    Larsson, Maire and Shakhnarovich 2017, FractalNet, arXiv:1605.07648; per sample and with scaling, as in DARTS.
    """
    keep = features.new_ones(()) - probability
    return features * (torch.bernoulli(keep.expand(len(features), 1, 1, 1)) / keep)
