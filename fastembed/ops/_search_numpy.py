"""The search ops on NumPy arrays, without PyTorch. The public functions, with their docs, are in `search`."""

from typing import Any

import numpy as np

from .._checks import raise_not_finite
from .._native import core, num_threads
from . import _search_checks as checks

# float32 and float16 as csrc/common/dtype.hpp numbers them.
_KERNEL_DTYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 2}


Array = np.ndarray


def pack_bits(x: Array, thresholds: Array | None) -> Array:
    checks.check_pack_bits(x, thresholds)
    if x.dtype not in _KERNEL_DTYPES:
        return np.packbits(x > (0 if thresholds is None else thresholds), axis=-1)
    x = _dense(x)
    codes = np.empty((*x.shape[:-1], checks.code_bytes(x.shape[-1])), np.uint8)
    rows = int(np.prod(x.shape[:-1], dtype=np.int64))
    thresholds = None if thresholds is None else _dense(thresholds)
    core.pack_bits(
        *(core.address(x), _KERNEL_DTYPES[x.dtype], rows, x.shape[-1]),
        *(0 if thresholds is None else core.address(thresholds), core.address(codes), num_threads()),
    )
    return codes


def unpack_bits(codes: Array, dim: int) -> Array:
    checks.check_unpack_bits(codes, dim)
    return np.unpackbits(codes, axis=-1, count=dim)


def hamming_topk(
    queries: Array, codes: Array, k: int, mask: Array | None, ids: Array | None, ranges: Array | None
) -> tuple[Array, Array]:
    checks.check_hamming_topk(queries, codes, k, mask, ids, ranges)
    selection = _Selection(codes, mask, ids, ranges)
    queries, codes = _byte_rows(queries), _byte_rows(codes)
    distances = np.empty((len(queries), k), np.int32)
    found = np.empty((len(queries), k), np.int64)
    core.hamming_topk(
        *(core.address(queries), len(queries), queries.strides[0]),
        *(core.address(codes), len(codes), codes.strides[0], codes.shape[1]),
        selection.parts,
        *(k, core.address(distances), core.address(found), num_threads()),
    )
    return distances, found


def hamming_range(
    queries: Array, codes: Array, radius: int, mask: Array | None, ids: Array | None, ranges: Array | None
) -> tuple[Array, Array, Array]:
    checks.check_hamming_range(queries, codes, radius, mask, ids, ranges)
    selection = _Selection(codes, mask, ids, ranges)
    queries, codes = _byte_rows(queries), _byte_rows(codes)
    result = core.hamming_range(
        *(core.address(queries), len(queries), queries.strides[0]),
        *(core.address(codes), len(codes), codes.strides[0], codes.shape[1]),
        selection.parts,
        *(checks.within_codes(radius, codes), num_threads()),
    )
    lims, distances = np.empty(len(queries) + 1, np.int64), np.empty(result.total, np.int32)
    found = np.empty(result.total, np.int64)
    result.write(core.address(lims), core.address(distances), core.address(found))
    return lims, distances, found


def sdc_encode(x: Array, bits: int) -> tuple[Array, Array]:
    checks.check_sdc_encode(x, bits)
    x = _dense(x, np.float32)
    codes = np.empty((len(x), bits * checks.code_bytes(x.shape[1])), np.uint8)
    inverse_norms = np.empty(len(x), np.float32)
    raise_not_finite(
        core.sdc_encode(
            *(
                core.address(x),
                len(x),
                x.shape[1],
                bits,
                core.address(codes),
                core.address(inverse_norms),
                num_threads(),
            )
        )
    )
    return codes, inverse_norms


def sdc_levels(codes: Array, bits: int, dim: int) -> Array:
    planes = np.unpackbits(codes.reshape(len(codes), bits, checks.code_bytes(dim)), axis=-1)[..., :dim]
    dtype: Any = np.int8 if bits < 8 else np.int16
    weights = 2 ** np.arange(bits - 1, -1, -1, dtype=dtype)
    return 2 * (planes * weights[:, None]).sum(axis=1, dtype=dtype) - dtype(2**bits - 1)


def sdc_topk(
    queries: Array,
    query_inverse_norms: Array,
    codes: Array,
    inverse_norms: Array,
    bits: int,
    dim: int,
    k: int,
    mask: Array | None,
    ids: Array | None,
    ranges: Array | None,
) -> tuple[Array, Array]:
    checks.check_sdc_topk(queries, query_inverse_norms, codes, inverse_norms, bits, dim, k, mask, ids, ranges)
    selection = _Selection(codes, mask, ids, ranges)
    queries, codes = _byte_rows(queries), _byte_rows(codes)
    query_inverse_norms, inverse_norms = _dense(query_inverse_norms), _dense(inverse_norms)
    scores = np.empty((len(queries), k), np.float32)
    found = np.empty((len(queries), k), np.int64)
    core.sdc_topk(
        *(core.address(queries), core.address(query_inverse_norms), len(queries), queries.strides[0]),
        *(core.address(codes), core.address(inverse_norms), len(codes), codes.strides[0]),
        *(dim, bits),
        selection.parts,
        *(k, core.address(scores), core.address(found), num_threads()),
    )
    return scores, found


def lists_topk(
    queries: dict[str, Array],
    columns: dict[str, Array],
    dim: int,
    bits: int,
    k: int,
    starts: Array,
    ids: Array,
    *,
    centroids: Array | None = None,
    probes: int = 0,
    probed: Array | None = None,
) -> tuple[Array, Array]:
    """(values [Q, k], rows [Q, k]) of the k best rows by value and id in some inverted lists: those `probed` [Q, n], or
    the `probes` lists nearest by binary centroids. An index calls it with columns of its own: nothing is checked.

    Args:
        queries, columns: "codes" and, for SDC, "inverse_norms".
        starts: int64 [lists + 1], first row of each list, then the number of rows.
        ids: int64, of the rows, ascending within each list.
    """
    query_codes, codes = _byte_rows(queries["codes"]), _byte_rows(columns["codes"])
    if probed is None:
        assert centroids is not None
        centroids, probed = _dense(centroids), np.empty((len(query_codes), probes), np.int64)
    else:
        centroids, probed = None, _dense(probed, np.int64)
    starts, ids = _dense(starts), _dense(ids)
    is_sdc = "inverse_norms" in columns
    norms = [_dense(given["inverse_norms"]) for given in (queries, columns)] if is_sdc else []
    query_norms, code_norms = map(core.address, norms) if is_sdc else (0, 0)
    values = np.empty((len(query_codes), k), np.float32 if is_sdc else np.int32)
    rows = np.empty(values.shape, np.int64)
    core.lists_topk(
        *(core.address(query_codes), query_norms, len(query_codes), query_codes.strides[0]),
        *(core.address(codes), code_norms, len(codes), codes.strides[0], dim, bits),
        *(0 if centroids is None else core.address(centroids), len(starts) - 1),
        *(core.address(starts), core.address(ids), core.address(probed), probed.shape[1], k),
        *(core.address(values), core.address(rows), num_threads()),
    )
    return values, rows


def rescore(queries: Array, documents: Array, candidate_ids: Array, k: int) -> tuple[Array, Array]:
    checks.check_rescore(queries, documents, candidate_ids, k)
    checks.check_candidates(candidate_ids, len(documents))
    named = None
    if documents.dtype != np.float32 or not (documents.flags.c_contiguous and documents.flags.aligned):
        # Convert the documents that are named, not all of them.
        named, candidate_ids = unique(candidate_ids)
        documents = _dense(documents[named], np.float32)
    queries, candidate_ids = _dense(queries, np.float32), _dense(candidate_ids, np.int64)
    scores = np.empty((len(queries), k), np.float32)
    ids = np.empty((len(queries), k), np.int64)
    core.rescore(
        *(core.address(queries), len(queries), core.address(documents), documents.shape[1]),
        *(
            core.address(candidate_ids),
            candidate_ids.shape[1],
            k,
            core.address(scores),
            core.address(ids),
            num_threads(),
        ),
    )
    return scores, ids if named is None else named[ids]


def unique(ids: Array) -> tuple[Array, Array]:
    """The distinct ids, ascending, and where each of `ids` stands among them."""
    named, places = np.unique(ids, return_inverse=True)
    return named, places.reshape(ids.shape)


def as_float32(x: Array) -> Array:
    return x.astype(np.float32, copy=False)


class _Selection:
    """The filters of a search as the kernels take them; holds on to the arrays that `parts` points into."""

    def __init__(self, codes: Array, mask: Array | None, ids: Array | None, ranges: Array | None) -> None:
        checks.check_filter_values(len(codes), ids, ranges)
        ids = np.flatnonzero(mask) if mask is not None else ids
        self._ids = None if ids is None else _dense(ids, np.int64)
        self._ranges = None if ranges is None else _dense(ranges)
        self.parts = (
            *((0, -1) if self._ids is None else (core.address(self._ids), len(self._ids))),
            *((0, -1) if self._ranges is None else (core.address(self._ranges), self._ranges.shape[1])),
        )


def _dense(x: Array, dtype: Any = None) -> Array:
    """Row-major and aligned: as it is, or copied."""
    return np.require(x, dtype, ["C", "A"])


def _byte_rows(codes: Array) -> Array:
    """The codes with the bytes of each row adjacent: as they are, or copied."""
    return codes if codes.strides[1] == 1 else np.ascontiguousarray(codes)
