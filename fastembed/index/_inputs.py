"""What users hand to an index, as NumPy arrays that are checked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from .. import _native
from .._checks import FLOATS, check_array
from ..ops.search import SDCCodes
from ._rows import Filter

LARGEST_ID = np.iinfo(np.int64).max


def is_tensor(x: Any) -> bool:
    return _native.torch is not None and isinstance(x, _native.torch.Tensor)


def to_numpy(name: str, x: Any) -> Any:
    """An array, or `SDCCodes` of arrays, of what is one or a tensor; bfloat16 becomes float32."""
    if isinstance(x, SDCCodes):
        return replace(x, codes=to_numpy(name, x.codes), inverse_norms=to_numpy(name, x.inverse_norms))
    if is_tensor(x):
        x = x.detach().cpu()
        return (x.float() if x.dtype == _native.torch.bfloat16 else x).numpy()
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, a tensor or SDCCodes, got {type(x).__name__}")
    return x


def is_codes(x: Any) -> bool:
    """Whether x, as `to_numpy` gives it, holds codes rather than real vectors."""
    return isinstance(x, SDCCodes) or x.dtype == np.uint8


def check_vectors(name: str, x: Any, dim: int) -> np.ndarray:
    """The finite real vectors x [N, dim]."""
    check_array(name, x, 2, FLOATS)
    if x.shape[1] != dim:
        raise ValueError(f"{name} must have the {dim} dims of the index, got {x.shape[1]}")
    for start, chunk in row_chunks(x):
        if not np.isfinite(chunk).all():
            row = start + int(np.argmin(np.isfinite(chunk).all(axis=1)))
            raise ValueError(f"{name} must be finite, got a NaN or infinity in row {row}")
    return x


def row_chunks(x: np.ndarray, elements: int = 1 << 22) -> Any:
    """(first row, rows) of pieces of x, so that temporaries stay small."""
    step = max(1, elements // max(1, x.shape[1]))
    return ((start, x[start : start + step]) for start in range(0, len(x), step))


def check_ids(name: str, ids: Any) -> np.ndarray:
    """int64 [N] of ids 0 to 2^63 - 1, given as an array, a tensor or a sequence of integers."""
    return _checked_ids(name, ids, _array_of(ids))


def _array_of(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if is_tensor(values) else np.asarray(values)


def _checked_ids(name: str, ids: Any, values: np.ndarray) -> np.ndarray:
    """As `check_ids`, of ids that are `values` as an array."""
    # A number, or what NumPy does not take for a sequence: a set, an iterator.
    if values.ndim == 0 and values is not ids:
        raise TypeError(f"{name} must be an array, a tensor or a sequence of integers, got {type(ids).__name__}")
    if values.ndim != 1:
        raise ValueError(f"{name} must have shape [rows], got {list(values.shape)}")
    if len(values) == 0:
        return np.empty(0, np.int64)
    if values.dtype == object and all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        pass  # Python integers that no dtype of NumPy holds
    elif not np.issubdtype(values.dtype, np.integer):
        raise TypeError(f"{name} must be integers, got {values.dtype}")
    smallest, largest = values.min(), values.max()
    if smallest < 0 or largest > LARGEST_ID:
        wrong = smallest if smallest < 0 else largest
        raise ValueError(f"{name} must be between 0 and 2^63 - 1, got {wrong}")
    return values.astype(np.int64)


def check_distinct(name: str, ids: np.ndarray) -> None:
    ordered = np.sort(ids)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        raise ValueError(f"{name} must be distinct, got {repeated[0]} more than once")


def check_filter(allowed: Any) -> Filter | None:
    """`Filter` of a boolean mask indexed by id, or of a list of ids; None stays None."""
    if allowed is None:
        return None
    values = _array_of(allowed)
    if values.dtype != bool:
        return Filter(None, np.unique(_checked_ids("filter", allowed, values)))
    if values.ndim != 1:
        raise ValueError(f"filter must have shape [ids], got {list(values.shape)}")
    return Filter(values, None)
