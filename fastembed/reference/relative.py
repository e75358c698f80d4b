"""Relative representations in plain PyTorch: cos(x_i, a_j), a vector shorter than 1e-12 counting as that long."""

from torch import Tensor
from torch.nn import functional as F

SMALLEST_NORM = 1e-12


def relative_representations(x: Tensor, anchors: Tensor) -> Tensor:
    """See `fastembed.relative_representations`."""
    return F.normalize(x, eps=SMALLEST_NORM) @ F.normalize(anchors, eps=SMALLEST_NORM).T
