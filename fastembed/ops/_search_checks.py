"""What the search ops ask of their inputs."""

from typing import Any

from .._checks import (
    FLOAT32,
    FLOATS,
    INT64,
    MASKS,
    UINT8,
    are_tensors,
    check_array,
    check_device,
    check_dtype,
    check_integer,
)

MAX_SDC_BITS = 8
# Row numbers are 32 bits wide in the kernels.
MAX_ROWS = 2**32 - 1


def code_bytes(dim: int) -> int:
    """Bytes of one bit plane."""
    return (dim + 7) // 8


def check_pack_bits(x: Any, thresholds: Any) -> None:
    check_dtype("x", x, FLOATS)
    if x.ndim == 0:
        raise ValueError("x must have at least one axis, got a scalar")
    if thresholds is None:
        return
    check_array("thresholds", thresholds, 1, FLOAT32)
    check_device(x, thresholds, "thresholds", "x")
    if thresholds.shape[0] != x.shape[-1]:
        raise ValueError(f"thresholds must have a value for each of {x.shape[-1]} dims, got {thresholds.shape[0]}")


def check_unpack_bits(codes: Any, dim: int) -> None:
    check_dtype("codes", codes, UINT8)
    if codes.ndim == 0:
        raise ValueError("codes must have at least one axis, got a scalar")
    check_integer("dim", dim, 0)
    if codes.shape[-1] != code_bytes(dim):
        raise ValueError(f"codes must be {code_bytes(dim)} bytes wide for dim {dim}, got {codes.shape[-1]}")


def check_hamming_topk(queries: Any, codes: Any, k: int, mask: Any, ids: Any, ranges: Any) -> None:
    _check_hamming(queries, codes)
    check_k(k, codes.shape[0])
    check_filters(queries, codes, mask, ids, ranges)


def check_hamming_range(queries: Any, codes: Any, radius: int, mask: Any, ids: Any, ranges: Any) -> None:
    _check_hamming(queries, codes)
    check_integer("radius", radius, 0)
    check_filters(queries, codes, mask, ids, ranges)


def _check_hamming(queries: Any, codes: Any) -> None:
    check_array("queries", queries, 2, UINT8)
    check_array("codes", codes, 2, UINT8)
    check_device(queries, codes, "codes")
    if queries.shape[1] != codes.shape[1]:
        raise ValueError(f"queries must have the {codes.shape[1]} bytes of the codes, got {queries.shape[1]}")


def check_filters(queries: Any, codes: Any, mask: Any, ids: Any, ranges: Any) -> None:
    """What can be said about the filters of a search without looking into them."""
    rows = codes.shape[0]
    if rows > MAX_ROWS:
        raise ValueError(f"codes must have at most {MAX_ROWS} rows, got {rows}")
    if mask is not None:
        if ids is not None:
            raise ValueError("mask and ids must not be given both")
        check_array("mask", mask, 1, MASKS)
        check_device(queries, mask, "mask")
        if mask.shape[0] != rows:
            raise ValueError(f"mask must have a value for each of the {rows} codes, got {mask.shape[0]}")
    if ids is not None:
        check_array("ids", ids, 1, INT64)
        check_device(queries, ids, "ids")
    if ranges is not None:
        check_array("ranges", ranges, 3, INT64, "[queries, ranges per query, 2]")
        check_device(queries, ranges, "ranges")
        if ranges.shape[0] != queries.shape[0] or ranges.shape[2] != 2:
            raise ValueError(
                f"ranges must have shape [{queries.shape[0]}, ranges per query, 2] for {queries.shape[0]} queries, "
                f"got {list(ranges.shape)}"
            )


def within_codes(radius: int, codes: Any) -> int:
    """The radius, but no larger than any distance."""
    return min(radius, 8 * codes.shape[1])


def check_filter_values(rows: int, ids: Any, ranges: Any) -> None:
    """Raise IndexError for row numbers that are none of `rows`, ValueError for ids or range ends out of order."""
    if ids is not None and ids.shape[0]:
        if ids.shape[0] > 1 and not bool((ids[1:] > ids[:-1]).all()):
            raise ValueError("ids must be strictly ascending")
        if ids[0] < 0 or ids[-1] >= rows:
            wrong = ids[0] if ids[0] < 0 else ids[-1]
            raise IndexError(f"ids must be row numbers of the {rows} codes, got {int(wrong)}")
    if ranges is not None and 0 not in ranges.shape:
        smallest, largest = int(ranges.min()), int(ranges.max())
        if smallest < 0 or largest > rows:
            wrong = smallest if smallest < 0 else largest
            raise IndexError(f"ranges must lie within the {rows} codes, got an end at {wrong}")
        if not bool((ranges[..., 0] <= ranges[..., 1]).all()):
            raise ValueError("ranges must not end before they begin")


def check_sdc_encode(x: Any, bits: int) -> None:
    check_array("x", x, 2, FLOATS)
    if x.shape[1] == 0:
        raise ValueError("x must have at least one dim, got 0")
    check_integer("bits", bits, 1, MAX_SDC_BITS)


def check_sdc_codes(codes: Any, inverse_norms: Any, bits: int, dim: int) -> None:
    are_tensors(codes=codes, inverse_norms=inverse_norms)
    check_integer("bits", bits, 1, MAX_SDC_BITS)
    # Dot products are 32-bit integers.
    check_integer("dim", dim, 1, (2**31 - 1) // (2**bits - 1) ** 2)
    check_array("codes", codes, 2, UINT8)
    check_array("inverse_norms", inverse_norms, 1, FLOAT32)
    width = bits * code_bytes(dim)
    if codes.shape[1] != width:
        raise ValueError(f"codes must be {width} bytes wide for dim {dim}, got {codes.shape[1]}")
    if inverse_norms.shape[0] != codes.shape[0]:
        raise ValueError(
            f"inverse_norms must have one value for each of the {codes.shape[0]} codes, got {inverse_norms.shape[0]}"
        )


def check_sdc_topk(
    queries: Any,
    query_norms: Any,
    codes: Any,
    code_norms: Any,
    bits: int,
    dim: int,
    k: int,
    mask: Any,
    ids: Any,
    ranges: Any,
) -> None:
    check_sdc_codes(queries, query_norms, bits, dim)
    check_sdc_codes(codes, code_norms, bits, dim)
    for other in (query_norms, codes, code_norms):
        check_device(queries, other, "codes")
    check_k(k, codes.shape[0])
    check_filters(queries, codes, mask, ids, ranges)


def check_rescore(queries: Any, documents: Any, candidate_ids: Any, k: int) -> None:
    check_array("queries", queries, 2, FLOATS)
    check_array("documents", documents, 2, FLOATS)
    check_array("candidate_ids", candidate_ids, 2, INT64)
    check_device(queries, documents, "documents")
    check_device(queries, candidate_ids, "candidate_ids")
    if queries.dtype != documents.dtype:
        raise TypeError(f"documents must have the dtype of the queries, {queries.dtype}, got {documents.dtype}")
    if queries.shape[1] != documents.shape[1]:
        raise ValueError(f"documents must have the {queries.shape[1]} dims of the queries, got {documents.shape[1]}")
    if queries.shape[0] != candidate_ids.shape[0]:
        raise ValueError(
            f"candidate_ids must have a row for each of the {queries.shape[0]} queries, got {candidate_ids.shape[0]}"
        )
    check_k(k, candidate_ids.shape[1], "candidates")


def check_candidates(candidate_ids: Any, documents: int) -> None:
    """Raise IndexError for ids that are no row of the documents."""
    if 0 in candidate_ids.shape:
        return
    smallest, largest = int(candidate_ids.min()), int(candidate_ids.max())
    if smallest < 0 or largest >= documents:
        wrong = smallest if smallest < 0 else largest
        raise IndexError(f"candidate_ids must be row numbers of the {documents} documents, got {wrong}")


def check_k(k: Any, count: int, of: str = "codes") -> Any:
    """k, as `check_integer` returns it."""
    if count == 0:
        check_integer("k", k, 1)
        raise ValueError(f"k must be at most the number of {of}, but there are none")
    return check_integer("k", k, 1, count)
