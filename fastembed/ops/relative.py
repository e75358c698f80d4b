"""Relative representations: embeddings described by their cosines to anchors. From NumPy arrays with or without
PyTorch, and from tensors through a registered op."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .. import _native
from .._checks import FLOATS, are_tensors, check_array
from .._native import core, num_threads

if TYPE_CHECKING:
    from torch import Tensor

    Array = TypeVar("Array", np.ndarray, Tensor)

if _native.torch is not None:
    from . import _relative_torch

# As csrc/common/dtype.hpp numbers them.
_DTYPE_CODES: dict[Any, int] = {np.float32: 0, np.float16: 2}


def relative_representations(x: Array, anchors: Array) -> Array:
    """The cosine of each embedding to each anchor.

    Encoders whose spaces differ by a rotation and a scale give the same relative representations, given the embeddings
    of the same anchor texts by each: so the vectors of one can search those of another. Other differences between
    spaces stay. Where all embeddings lean one way, cosines are mostly positive: subtract the mean before taking signs.

    With gradients to both arguments. Norms are summed in float64 and cosines in float32, rounded once; a vector of
    zeros has cosine 0 to everything.

    Args:
        x: [N, D], float32, float16, bfloat16 or float64 (arrays of which are computed in float32); an array or a
            tensor.
        anchors: [K, D] of the same dtype and kind.

    Returns:
        [N, K], of the dtype and kind of x.

    Raises:
        TypeError: arrays and tensors are mixed, or a wrong or different dtype.
        ValueError: a wrong rank, or dims that differ.

    Source: Moschella et al., "Relative representations enable zero-shot latent space communication", ICLR 2023,
    arXiv 2209.15430.
    """
    tensors = are_tensors(x=x, anchors=anchors)
    _check(x, anchors)
    if tensors:
        return _relative_torch.relative_representations(x, anchors)
    return _of_arrays(x, anchors)


def _of_arrays(x: Any, anchors: Any) -> Any:
    dtype = np.float16 if x.dtype == np.float16 else np.float32
    cosines = np.empty((len(x), len(anchors)), dtype)
    rows, anchor_rows = (np.require(array, dtype, ["C", "A"]) for array in (x, anchors))
    core.relative_representations(
        *(core.address(rows), len(x), core.address(anchor_rows), len(anchors), x.shape[1]),
        *(_DTYPE_CODES[dtype], core.address(cosines), num_threads()),
    )
    return cosines.astype(x.dtype, copy=False)


def _check(x: Any, anchors: Any) -> None:
    check_array("x", x, 2, FLOATS)
    check_array("anchors", anchors, 2, FLOATS)
    if x.dtype != anchors.dtype:
        raise TypeError(f"anchors must have the dtype of x, {x.dtype}, got {anchors.dtype}")
    if x.shape[1] != anchors.shape[1]:
        raise ValueError(f"anchors must have the {x.shape[1]} dims of x, got {anchors.shape[1]}")
