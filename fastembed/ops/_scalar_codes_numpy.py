"""The ops of scalar codes on NumPy arrays, without PyTorch."""

from typing import Any

import numpy as np

from .._checks import raise_not_finite
from .._native import core, num_threads
from . import _scalar_codes_checks as scalar_checks
from . import _search_checks as checks
from ._search_numpy import _KERNEL_DTYPES, _byte_rows, _dense, _Selection

Array = np.ndarray


def scalar_encode(
    x: Array, centroid: Array | None, signs: Array | None, bits: int, method: str, metric: str
) -> tuple[Array, Array]:
    scalar_checks.check_encode(x, centroid, signs, bits, method, metric)
    x = _dense(x, None if x.dtype in _KERNEL_DTYPES else np.float32)
    centroid, signs = (None if some is None else _dense(some) for some in (centroid, signs))
    codes = np.empty((len(x), bits * checks.code_bytes(x.shape[1])), np.uint8)
    factors = np.empty((len(x), scalar_checks.FACTORS), np.float32)
    bad = core.scalar_encode(
        *(core.address(x), _KERNEL_DTYPES[x.dtype], x.shape[0], x.shape[1]),
        *(0 if centroid is None else core.address(centroid), 0 if signs is None else core.address(signs)),
        *(bits, scalar_checks.METHODS[method], scalar_checks.METRICS[metric]),
        *(core.address(codes), core.address(factors), num_threads()),
    )
    raise_not_finite(bad)
    return codes, factors


def scalar_integers(codes: Array, bits: int, dim: int) -> Array:
    planes = np.unpackbits(codes.reshape(len(codes), bits, checks.code_bytes(dim)), axis=-1)[..., :dim]
    weights = 2 ** np.arange(bits - 1, -1, -1, dtype=np.int32)
    return (planes * weights[:, None]).sum(axis=1, dtype=np.int32)


def scalar_topk(
    queries: Array,
    query_factors: Array,
    query_bits: int,
    codes: Array,
    factors: Array,
    bits: int,
    dim: int,
    k: int,
    mask: Array | None,
    ids: Array | None,
    ranges: Array | None,
) -> tuple[Array, Array]:
    scalar_checks.check_topk(queries, query_factors, query_bits, codes, factors, bits, dim, k, mask, ids, ranges)
    selection = _Selection(codes, mask, ids, ranges)
    queries, codes = _byte_rows(queries), _byte_rows(codes)
    query_factors, factors = _dense(query_factors), _dense(factors)
    scores: Any = np.empty((len(queries), k), np.float32)
    found = np.empty((len(queries), k), np.int64)
    core.scalar_topk(
        *(core.address(queries), core.address(query_factors), len(queries), queries.strides[0], query_bits),
        *(core.address(codes), core.address(factors), len(codes), codes.strides[0], bits, dim),
        selection.parts,
        *(k, core.address(scores), core.address(found), num_threads()),
    )
    return scores, found
