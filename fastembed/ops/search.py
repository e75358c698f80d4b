"""Search over binary and few-bit codes: NumPy arrays in, NumPy arrays out, with or without PyTorch; tensors in, tensors
out through registered ops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .. import _native
from .._checks import FLOATS, INT64, are_tensors, check_array
from . import _search_checks as checks
from . import _search_numpy

if TYPE_CHECKING:
    from torch import Tensor

    Array = TypeVar("Array", np.ndarray, Tensor)

if _native.torch is not None:
    from . import _search_torch


def pack_bits(x: Array, *, thresholds: Array | None = None) -> Array:
    """Binary codes of real vectors: one bit per dimension, set where it is above its threshold.

    Bit d of a vector stands in byte d // 8, most significant bit first, and the last byte is filled up with zeros: the
    layout of `numpy.packbits(x > 0)` and of sentence-transformers' `quantize_embeddings(x, "ubinary")`. NaN gives a 0
    bit, and so does a value equal to its threshold.

    Args:
        x: [N, D], or any other shape with at least one axis; float32, float16, bfloat16 or float64. An array or a
            tensor; what comes back is of the same kind.
        thresholds: float32 [D]; 0 for every dim without them. Compared with x as it is, not rounded to its dtype.

    Returns:
        uint8 [N, ceil(D / 8)].

    Raises:
        TypeError: x is neither an array nor a tensor, or its dtype is none of the above; thresholds are not float32.
        ValueError: x has no axis, or thresholds do not have one value per dim.
    """
    return _ops(x=x, **_given(thresholds=thresholds)).pack_bits(x, thresholds)


def unpack_bits(codes: Array, dim: int) -> Array:
    """The bits of binary codes: the inverse of `pack_bits`, as far as one bit goes.

    Args:
        codes: uint8 [N, ceil(dim / 8)], or any other shape with at least one axis. An array or a tensor.
        dim: how many bits a code has.

    Returns:
        uint8 [N, dim] of zeros and ones. Levels +-1 are `2 * bits.astype(int8) - 1`.

    Raises:
        TypeError: codes is neither an array nor a tensor, or not uint8, or dim is no integer.
        ValueError: the codes are not ceil(dim / 8) bytes wide.
    """
    return _ops(codes=codes).unpack_bits(codes, dim)


def hamming_topk(
    queries: Array,
    codes: Array,
    k: int,
    *,
    mask: Array | None = None,
    ids: Array | None = None,
    ranges: Array | None = None,
) -> tuple[Array, Array]:
    """The k codes nearest to each query in Hamming distance, exactly.

    Results are ordered by distance, equal distances by id, and depend neither on the number of threads nor on the
    instruction set nor on the other queries.

    Filters say which codes are searched; `ranges` go together with `mask` or `ids`, and what every filter lets through
    is searched. Their cost is that of the codes they let through.

    Args:
        queries: uint8 [Q, B] binary codes, as `pack_bits` makes them; any number of bytes B.
        codes: uint8 [N, B], of the same kind (array or tensor) and on the same device. Rows may lie any distance
            apart (a slice of rows, or of the leading bytes of longer codes, or a `numpy.memmap`): they are read in
            place as long as the bytes of a row are adjacent.
        k: how many codes to return for each query, 1 to N.
        mask: bool or uint8 [N], the codes to search (not zero), the same for all queries.
        ids: int64 [M], row numbers of the codes to search, strictly ascending, the same for all queries.
        ranges: int64 [Q, R, 2], for each query R ranges of rows to search, each its first row and the one past its
            last, such as the inverted lists that a query probes. They may be empty, overlap and come in any order.

    Returns:
        (distances int32 [Q, k], ids int64 [Q, k]); an id is a row number of `codes`. Where the filters leave a query
        fewer than k codes, distance 2147483647 and id -1 fill its row up.

    Raises:
        TypeError: arrays and tensors are mixed, or a dtype is wrong, or k is no integer.
        ValueError: a wrong rank or size, widths that differ, k outside 1..N, both mask and ids, ids not ascending, or a
            range that ends before it begins.
        IndexError: ids or ranges beyond the rows of `codes`.
    """
    ops = _ops(queries=queries, codes=codes, **_given(mask=mask, ids=ids, ranges=ranges))
    return ops.hamming_topk(queries, codes, k, mask, ids, ranges)


def hamming_range(
    queries: Array,
    codes: Array,
    radius: int,
    *,
    mask: Array | None = None,
    ids: Array | None = None,
    ranges: Array | None = None,
) -> tuple[Array, Array, Array]:
    """All codes within a Hamming distance of each query, exactly.

    Args:
        queries, codes, mask, ids, ranges: as for `hamming_topk`.
        radius: the largest distance that is within, 0 or more. Distances are whole numbers: `distance < r`, as FAISS's
            `range_search` has it, is a radius of r - 1.

    Returns:
        (lims int64 [Q + 1], distances int32 [T], ids int64 [T]): the results of query q are those from lims[q] up to
        lims[q + 1], ordered by distance, equal distances by id.

    Raises:
        TypeError, ValueError, IndexError: as `hamming_topk` does; a negative radius.
    """
    ops = _ops(queries=queries, codes=codes, **_given(mask=mask, ids=ids, ranges=ranges))
    return ops.hamming_range(queries, codes, radius, mask, ids, ranges)


@dataclass(frozen=True, eq=False)
class SDCCodes:
    """Few-bit codes of N vectors, as `sdc_encode` makes them. `len(codes)` is N; `codes[rows]` selects rows by a slice,
    ids or a mask, a slice without copying.

    Attributes:
        codes: uint8 [N, bits * ceil(dim / 8)]. Bit planes one after another, the most significant first, each packed
            as by `pack_bits`: the first ceil(dim / 8) bytes of a row are the binary code of the vector.
        inverse_norms: float32 [N], 1 / L2 norm of each vector of levels.
        bits: planes per code, 1 to 8.
        dim: dimensions of the vectors encoded.
    """

    codes: Any
    inverse_norms: Any
    bits: int
    dim: int

    def __post_init__(self) -> None:
        checks.check_sdc_codes(self.codes, self.inverse_norms, self.bits, self.dim)

    def __len__(self) -> int:
        return self.codes.shape[0]

    def __getitem__(self, rows: Any) -> SDCCodes:
        if isinstance(rows, (int, np.integer, tuple)):
            raise TypeError(f"rows must be a slice, an array of ids or a mask, got {rows!r}")
        return SDCCodes(self.codes[rows], self.inverse_norms[rows], self.bits, self.dim)

    @property
    def nbytes(self) -> int:
        """Bytes that the codes and their norms take."""
        return self.codes.nbytes + self.inverse_norms.nbytes

    def levels(self) -> Any:
        """The levels 2 c - (2^bits - 1) that the codes stand for: int8 [N, dim], with 8 bits int16; odd
        numbers."""
        return _ops(codes=self.codes).sdc_levels(self.codes, self.bits, self.dim)


def sdc_encode(x: Array, bits: int) -> SDCCodes:
    """Few-bit codes for `sdc_topk` (symmetric distance computation): `bits` bits per dimension.

    A value becomes one of the 2^bits odd levels v = 2 c - (2^bits - 1), which are the sums of sign planes
    2^(bits-1) b_0 + ... + b_(bits-1), b_t = +-1, of recurrent binary embeddings up to their common factor. The step
    between levels is chosen for each vector: its root mean square times the step of the uniform quantiser of least
    squared error for a normal source. Dimensions of embeddings are near enough to normal for it, and since a cosine
    ignores the scale of a vector, none has to be stored: scaling a vector leaves its code as it is.

    Args:
        x: [N, D] real vectors, D >= 1; float32, float16, bfloat16 or float64 (computed in float32). An array or a
            tensor.
        bits: 1 to 8. With 1 bit the codes are those of `pack_bits`.

    Returns:
        `SDCCodes` of N codes, holding arrays or tensors as x is one.

    Raises:
        TypeError: x is neither an array nor a tensor, or of a wrong dtype, or bits is no integer.
        ValueError: a wrong rank, bits outside 1..8, D = 0, or a NaN or infinity in x.

    Sources: Gan et al., "Binary Embedding-based Retrieval at Tencent", KDD 2023, arXiv 2302.08714 (codes and distance);
    Max, "Quantizing for Minimum Distortion", 1960, table II (steps up to 5 bits).
    """
    codes, inverse_norms = _ops(x=x).sdc_encode(x, bits)
    return SDCCodes(codes, inverse_norms, bits, x.shape[1])


def sdc_topk(
    queries: SDCCodes | Array,
    codes: SDCCodes,
    k: int,
    *,
    mask: Array | None = None,
    ids: Array | None = None,
    ranges: Array | None = None,
) -> tuple[Array, Array]:
    """The k codes with the largest cosine to each query, both decoded to their levels, exactly.

    The score of levels v and v' is float32(v . v') * (1 / |v'|) * (1 / |v|), code before query, with an exact integer
    dot product: the same bits whatever the instruction set, threads or batch. Results are ordered by descending score,
    equal scores by id.

    Args:
        queries: `SDCCodes` of Q codes of the same bits and dim, or real vectors [Q, D], which are encoded first.
        codes: `SDCCodes` of N codes, of the same kind (arrays or tensors) as the queries.
        k: how many codes to return for each query, 1 to N.
        mask, ids, ranges: which codes to search, as for `hamming_topk`.

    Returns:
        (scores float32 [Q, k], ids int64 [Q, k]); an id is a row number of `codes`. Where the filters leave a query
        fewer than k codes, score -inf and id -1 fill its row up.

    Raises:
        TypeError: arrays and tensors are mixed, a wrong type or dtype, or k is no integer.
        ValueError: bits or dims that differ, k outside 1..N, a NaN or infinity in real queries, or filters that
            `hamming_topk` refuses.
        IndexError: ids or ranges beyond the rows of `codes`.

    Source: Gan et al., "Binary Embedding-based Retrieval at Tencent", KDD 2023, arXiv 2302.08714.
    """
    if not isinstance(codes, SDCCodes):
        raise TypeError(f"codes must be SDCCodes, got {type(codes).__name__}")
    if not isinstance(queries, SDCCodes):
        _ops(queries=queries, codes=codes.codes)
        check_array("queries", queries, 2, FLOATS)
        if queries.shape[1] != codes.dim:
            raise ValueError(f"queries must have the {codes.dim} dims of the codes, got {queries.shape[1]}")
        queries = sdc_encode(queries, codes.bits)
    if (queries.bits, queries.dim) != (codes.bits, codes.dim):
        raise ValueError(
            f"queries must have the {codes.bits} bits and {codes.dim} dims of the codes, "
            f"got {queries.bits} and {queries.dim}"
        )
    ops = _ops(queries=queries.codes, codes=codes.codes, **_given(mask=mask, ids=ids, ranges=ranges))
    return ops.sdc_topk(
        *(queries.codes, queries.inverse_norms, codes.codes, codes.inverse_norms),
        *(codes.bits, codes.dim, k, mask, ids, ranges),
    )


def rescore(queries: Array, documents: Array | SDCCodes, candidate_ids: Array, k: int) -> tuple[Array, Array]:
    """The k of each query's candidates with the largest dot product: real vectors refine a search over codes.

    Documents may be codes themselves: then the queries keep their precision and only the documents are quantised
    (asymmetric distance computation), and the score is  query . (levels * inverse norm).

    Dot products are summed in float32, in one order on every CPU. Results are ordered by descending score, equal
    scores by id; a NaN score comes last. A candidate named twice is returned twice.

    Args:
        queries: [Q, D] float32, float16, bfloat16 or float64 (computed in float32).
        documents: [N, D] of the same dtype and kind (array or tensor); or `SDCCodes` of N documents (with 1 bit: sign
            codes), of which only the candidates are decoded.
        candidate_ids: int64 [Q, C], row numbers of `documents`, such as the ids of `hamming_topk`.
        k: how many to keep for each query, 1 to C.

    Returns:
        (scores float32 [Q, k], ids int64 [Q, k]).

    Raises:
        TypeError: arrays and tensors are mixed, a wrong or different dtype, or k is no integer.
        ValueError: a wrong rank, sizes that do not match, or k outside 1..C.
        IndexError: a candidate id outside 0..N-1.
    """
    if not isinstance(documents, SDCCodes):
        ops = _ops(queries=queries, documents=documents, candidate_ids=candidate_ids)
        return ops.rescore(queries, documents, candidate_ids, k)
    ops = _ops(queries=queries, documents=documents.codes, candidate_ids=candidate_ids)
    check_array("queries", queries, 2, FLOATS)
    check_array("candidate_ids", candidate_ids, 2, INT64)
    checks.check_candidates(candidate_ids, len(documents))
    named, places = ops.unique(candidate_ids)
    some = documents[named]
    queries, levels = ops.as_float32(queries), ops.as_float32(some.levels())
    scores, found = ops.rescore(queries, levels * some.inverse_norms[:, None], places, k)
    return scores, named[found]


def _ops(**inputs: Any) -> Any:
    """The module with the ops for inputs of this kind, each with the signature of its schema."""
    return _search_torch if are_tensors(**inputs) else _search_numpy


def _given(**inputs: Any) -> dict[str, Any]:
    """The optional inputs that are there."""
    return {name: value for name, value in inputs.items() if value is not None}
