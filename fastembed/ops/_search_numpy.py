"""The search ops on NumPy arrays, without PyTorch. The public functions, with their docs, are in `search`."""

from typing import Any

import numpy as np

from .._native import core, num_threads
from . import _search_checks as checks

# float32 and float16 as csrc/common/dtype.hpp numbers them.
_KERNEL_DTYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 2}


def pack_bits(x: np.ndarray) -> np.ndarray:
    checks.check_pack_bits(x)
    if x.dtype not in _KERNEL_DTYPES:
        return np.packbits(x > 0, axis=-1)
    x = _dense(x)
    codes = np.empty((*x.shape[:-1], checks.code_bytes(x.shape[-1])), np.uint8)
    rows = int(np.prod(x.shape[:-1], dtype=np.int64))
    core.pack_bits(core.address(x), _KERNEL_DTYPES[x.dtype], rows, x.shape[-1], core.address(codes), num_threads())
    return codes


def hamming_topk(queries: np.ndarray, codes: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    checks.check_hamming_topk(queries, codes, k)
    queries, codes = _byte_rows(queries), _byte_rows(codes)
    distances = np.empty((len(queries), k), np.int32)
    ids = np.empty((len(queries), k), np.int64)
    core.hamming_topk(
        *(core.address(queries), len(queries), queries.strides[0]),
        *(core.address(codes), len(codes), codes.strides[0]),
        *(codes.shape[1], k, core.address(distances), core.address(ids), num_threads()),
    )
    return distances, ids


def sdc_encode(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    checks.check_sdc_encode(x, bits)
    x = _dense(x, np.float32)
    codes = np.empty((len(x), bits * checks.code_bytes(x.shape[1])), np.uint8)
    inverse_norms = np.empty(len(x), np.float32)
    checks.raise_not_finite(
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


def sdc_levels(codes: np.ndarray, bits: int, dim: int) -> np.ndarray:
    planes = np.unpackbits(codes.reshape(len(codes), bits, checks.code_bytes(dim)), axis=-1)[..., :dim]
    weights = 2 ** np.arange(bits - 1, -1, -1, dtype=np.int8)
    return 2 * (planes * weights[:, None]).sum(axis=1, dtype=np.int8) - np.int8(2**bits - 1)


def sdc_topk(
    queries: np.ndarray,
    query_inverse_norms: np.ndarray,
    codes: np.ndarray,
    inverse_norms: np.ndarray,
    bits: int,
    dim: int,
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
    checks.check_sdc_topk(queries, query_inverse_norms, codes, inverse_norms, bits, dim, k)
    queries, codes = _byte_rows(queries), _byte_rows(codes)
    query_inverse_norms, inverse_norms = _dense(query_inverse_norms), _dense(inverse_norms)
    scores = np.empty((len(queries), k), np.float32)
    ids = np.empty((len(queries), k), np.int64)
    core.sdc_topk(
        *(core.address(queries), core.address(query_inverse_norms), len(queries), queries.strides[0]),
        *(core.address(codes), core.address(inverse_norms), len(codes), codes.strides[0]),
        *(dim, bits, k, core.address(scores), core.address(ids), num_threads()),
    )
    return scores, ids


def rescore(
    queries: np.ndarray, documents: np.ndarray, candidate_ids: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    checks.check_rescore(queries, documents, candidate_ids, k)
    checks.check_candidates(candidate_ids, len(documents))
    named = None
    if documents.dtype != np.float32 or not (documents.flags.c_contiguous and documents.flags.aligned):
        # Convert the documents that are named, not all of them.
        named, places = np.unique(candidate_ids, return_inverse=True)
        documents, candidate_ids = _dense(documents[named], np.float32), places.reshape(candidate_ids.shape)
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


def _dense(x: np.ndarray, dtype: Any = None) -> np.ndarray:
    """Row-major and aligned: as it is, or copied."""
    return np.require(x, dtype, ["C", "A"])


def _byte_rows(codes: np.ndarray) -> np.ndarray:
    """The codes with the bytes of each row adjacent: as they are, or copied."""
    return codes if codes.strides[1] == 1 else np.ascontiguousarray(codes)
