"""What the ops on scalar codes ask of their inputs."""

from typing import Any

from .._checks import FLOAT32, FLOATS, UINT8, are_tensors, check_array, check_integer
from . import _search_checks as checks

# As csrc/search/scalar_codes.hpp numbers them.
METHODS = {"rabitq": 0, "osq": 1, "sign": 2}
METRICS = {"ip": 0, "cosine": 1, "l2": 2}
FACTORS = 4
ROTATION_ROUNDS = 4
MAX_BITS = 8
# Queries have two bytes per dimension from 9 bits on, the second one of 7 bits.
MAX_QUERY_BITS = 15


def max_dim(bits: int) -> int:
    """Products of codes of up to 8 bits with bytes are summed in 32 bits; sums of codes are kept as float32."""
    return min((2**31 - 1) // (128 * (2 ** min(bits, MAX_BITS) - 1)), 2**24)


def check_settings(dim: Any, bits: Any, method: Any, metric: Any, most_bits: int) -> None:
    check_name("method", method, METHODS)
    check_name("metric", metric, METRICS)
    check_integer("bits", bits, 1, 1 if method == "sign" else most_bits)
    check_integer("dim", dim, 1, max_dim(bits))


def check_name(what: str, value: Any, names: dict[str, int]) -> None:
    if value not in names:
        raise ValueError(f"{what} must be {' or '.join(map(repr, names))}, got {value!r}")


def check_encode(x: Any, centroid: Any, signs: Any, bits: int, method: str, metric: str) -> None:
    check_array("x", x, 2, FLOATS)
    dim = x.shape[1]
    check_settings(dim, bits, method, metric, MAX_QUERY_BITS if method == "osq" else MAX_BITS)
    if centroid is not None:
        check_array("centroid", centroid, 1, FLOAT32)
        if centroid.shape[0] != dim:
            raise ValueError(f"centroid must have the {dim} dims of x, got {centroid.shape[0]}")
    if signs is not None:
        check_array("signs", signs, 2, UINT8)
        if tuple(signs.shape) != (ROTATION_ROUNDS, dim):
            raise ValueError(f"signs must have shape [{ROTATION_ROUNDS}, {dim}], got {list(signs.shape)}")


def check_codes(codes: Any, factors: Any, bits: Any, dim: Any, most_bits: int = MAX_QUERY_BITS) -> None:
    are_tensors(codes=codes, factors=factors)
    check_integer("bits", bits, 1, most_bits)
    check_integer("dim", dim, 1, max_dim(bits))
    check_array("codes", codes, 2, UINT8)
    check_array("factors", factors, 2, FLOAT32)
    width = bits * checks.code_bytes(dim)
    if codes.shape[1] != width:
        raise ValueError(f"codes must be {width} bytes wide for {bits} bits and dim {dim}, got {codes.shape[1]}")
    if tuple(factors.shape) != (codes.shape[0], FACTORS):
        raise ValueError(f"factors must have shape [{codes.shape[0]}, {FACTORS}], got {list(factors.shape)}")


def check_topk(
    queries: Any,
    query_factors: Any,
    query_bits: int,
    codes: Any,
    factors: Any,
    bits: int,
    dim: int,
    k: int,
    mask: Any,
    ids: Any,
    ranges: Any,
) -> None:
    check_codes(queries, query_factors, query_bits, dim)
    check_codes(codes, factors, bits, dim, MAX_BITS)
    if hasattr(codes, "device"):
        for other in (query_factors, codes, factors):
            if other.device != queries.device:
                raise ValueError(f"codes must be on the device of the queries, {queries.device}, got {other.device}")
    checks.check_k(k, codes.shape[0])
    checks.check_filters(queries, codes, mask, ids, ranges)
