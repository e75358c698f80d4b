"""Relative representations: embeddings described by their cosines to anchors."""

from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import _search_checks as checks

Array = TypeVar("Array", np.ndarray, Tensor)


def relative_representations(x: Array, anchors: Array) -> Array:
    """The cosine of each embedding to each anchor.

    Encoders whose spaces differ by a rotation and a scale give the same relative representations, given the embeddings
    of the same anchor texts by each: so the vectors of one can search those of another. Other differences between
    spaces stay. Where all embeddings lean one way, cosines are mostly positive: subtract the mean before taking signs.

    Plain PyTorch, with gradients to both arguments. A vector of zeros has cosine 0 to everything.

    Args:
        x: [N, D] real; an array or a tensor.
        anchors: [K, D] of the same dtype and kind.

    Returns:
        [N, K], of the dtype and kind of x.

    Raises:
        TypeError: arrays and tensors are mixed, or a wrong or different dtype.
        ValueError: a wrong rank, or dims that differ.

    Source: Moschella et al., "Relative representations enable zero-shot latent space communication", ICLR 2023,
    arXiv 2209.15430.
    """
    are_tensors = checks.are_tensors(x=x, anchors=anchors)
    checks.check_array("x", x, 2, checks.FLOATS)
    checks.check_array("anchors", anchors, 2, checks.FLOATS)
    if x.dtype != anchors.dtype:
        raise TypeError(f"anchors must have the dtype of x, {x.dtype}, got {anchors.dtype}")
    if x.shape[1] != anchors.shape[1]:
        raise ValueError(f"anchors must have the {x.shape[1]} dims of x, got {anchors.shape[1]}")
    if are_tensors:
        return _cosines(x, anchors)
    return _cosines(*(torch.from_numpy(np.ascontiguousarray(array)) for array in (x, anchors))).numpy()


def _cosines(x: Any, anchors: Any) -> Any:
    return F.normalize(x) @ F.normalize(anchors).T
