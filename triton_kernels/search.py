"""Exact top-k over binary and few-bit codes in Triton: one pass over the codes, and no sort of what it finds.

Codes are cut into groups of neighbours. `group_minima` multiplies a block of codes by a tile of queries on int8 tensor
cores, turns the products into integer keys, small ones best, and leaves the smallest key of each group. The k best
groups, by (smallest key, group), hold the k best codes, by (key, id): for any other group there are k codes before its
best one. So `group_members` looks again at the codes of those groups alone. Both write a key and what it belongs to as
one 64-bit integer. No two of these are equal, so whatever selects the smallest is exact, ties included.

With c the code of a dimension and t = c - 2^(bits - 1), a signed byte, every metric follows from sum(t s), an integer,
where s is what the caller makes of a query. Nothing is added atomically. How a search is cut depends on its sizes
alone.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# The key of a code that may not be found: every other key is smaller.
NO_KEY = tl.constexpr(2**31 - 1)
BLOCK_CODES = tl.constexpr(128)
BLOCK_BYTES = tl.constexpr(16)  # of a plane, multiplied at a time
FEW_QUERIES = tl.constexpr(16)  # a tile as small as tensor cores take
MANY_QUERIES = 64  # half as many where they have two parts
# Dimensions of a query come in multiples of this.
DIMS_AT_A_TIME = 8 * BLOCK_BYTES.value

# Codes in a group: the most that leaves an eighth of the codes, or less, to look at again.
GROUPS = (128, 16, 1)
REVISITED = 8
# 64-bit integers that a pass over the codes may leave behind; where queries need more, they take several passes.
WORKSPACE = 1 << 26
QUERIES_PER_LAUNCH = 65535

# Scores are rounded after each operation, as the reference rounds them.
COMPILER = {"enable_fp_fusion": False}


class Queries(NamedTuple):
    """Queries, made ready for a metric.

    Attributes:
        parts: int8 [Q, P, B], s for each dimension, zeros beyond the last one up to a multiple of DIMS_AT_A_TIME. P = 2
            parts stand for 128 * first + second.
        offsets: int32 [Q, P].
        scale: the product of a part is scale * sum(t s) + offset.
        factors: float32; see `_key`.
    """

    parts: Tensor
    offsets: Tensor
    scale: int
    factors: Tensor | None


class Codes(NamedTuple):
    """Codes to search.

    Attributes:
        data: uint8 [N, at least the bytes of all planes], the bytes of a row adjacent.
        plane_bytes: bytes of a plane.
        dim: dimensions.
        factors: float32; see `_key`.
        mask: uint8 [N], zero for codes that may not be found; or None.
    """

    data: Tensor
    plane_bytes: int
    dim: int
    factors: Tensor | None
    mask: Tensor | None


def find(
    metric: str, queries: Queries, codes: Codes, bits: int, ranges: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """(keys int32 [Q, k], ids int64 [Q, k]) of the k smallest keys of each query, equal keys by id; where the filters
    leave fewer, keys of NO_KEY with ids -1.

    Args:
        metric: "hamming", "sdc" or "scalar": see `_key`.
        bits: planes of a code.
        ranges: int64 [Q, R, 2], dense: the rows that may be found, first and past the last.
    """
    rows, parts, query_dims = queries.parts.shape
    count = len(codes.data)
    group = next(group for group in GROUPS if group == 1 or k * group * REVISITED <= count)
    groups = triton.cdiv(count, group)
    at_once = min(max(1, WORKSPACE // max(groups, k * group)), QUERIES_PER_LAUNCH)
    sizes = (codes.data.stride(0), count, 0 if ranges is None else ranges.shape[1])
    variant = {"METRIC": metric, "PARTS": parts, "BITS": bits, "GROUP": group, "num_warps": 8, **COMPILER}
    best = codes.data.new_empty(rows, k, dtype=torch.int64)
    with torch.cuda.device_of(codes.data):
        for first in range(0, rows, at_once):
            end = min(first + at_once, rows)
            search = (queries, query_dims, codes, *sizes, ranges, first, end)
            tile = FEW_QUERIES.value if end - first <= FEW_QUERIES.value else MANY_QUERIES // parts
            tiles = triton.cdiv(end - first, tile)
            found = best.new_empty(end - first, groups)
            group_minima[(triton.cdiv(count, BLOCK_CODES.value) * tiles,)](
                *search, found, groups, tiles, QUERIES=tile, **variant
            )
            found = found.topk(k, largest=False).values
            if group > 1:
                members = best.new_empty(end - first, k * group)
                group_members[triton.cdiv(k * group, BLOCK_CODES.value), end - first](
                    *search, found, k, members, **variant
                )
                found = members.topk(k, largest=False).values
            best[first:end] = found
    keys = (best >> 32).int()
    return keys, (best & 0xFFFFFFFF).masked_fill(keys == NO_KEY.value, -1)


@triton.jit
def group_minima(
    queries,
    query_dims,
    codes,
    stride,
    count,
    range_count,
    ranges,
    first_query,
    end_query,
    minima,
    groups,
    tiles,
    METRIC: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """minima[q - first_query, g] = (the smallest key of group g) << 32 | g. Grid: blocks of codes times `tiles` of
    queries, tiles first, so that programs that run together read the same codes."""
    block = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * QUERIES + tl.arange(0, QUERIES).to(tl.int64)
    query = first_query + row
    id = block * BLOCK_CODES + tl.arange(0, BLOCK_CODES)
    inside = (id < count)[:, None] & (query < end_query)[None, :]
    inside = _allowed(codes.mask, ranges, range_count, id, query, inside)
    keys = _keys(queries, query_dims, codes, stride, id, query, inside, METRIC, PARTS, BITS)
    PER_BLOCK: tl.constexpr = BLOCK_CODES // GROUP
    if GROUP > 1:
        keys = tl.min(tl.reshape(keys, (PER_BLOCK, GROUP, QUERIES)), axis=1)
    group = block * PER_BLOCK + tl.arange(0, PER_BLOCK)
    wanted = (group < groups)[:, None] & (query < end_query)[None, :]
    best = (keys.to(tl.int64) << 32) | group[:, None]
    tl.store(minima + row[None, :] * groups + group[:, None], best, mask=wanted)


@triton.jit
def group_members(
    queries,
    query_dims,
    codes,
    stride,
    count,
    range_count,
    ranges,
    first_query,
    end_query,
    chosen,
    k,
    members,
    METRIC: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """members[q - first_query, i] = key << 32 | id of code i % GROUP of a group, the lower half of
    chosen[q - first_query, i // GROUP]. Grid: (blocks of members, queries)."""
    row = tl.program_id(1).to(tl.int64)
    member = tl.program_id(0) * BLOCK_CODES + tl.arange(0, BLOCK_CODES)
    exists = member < k * GROUP
    group = tl.load(chosen + row * k + member // GROUP, mask=exists, other=0) & 0xFFFFFFFF
    id = group * GROUP + member % GROUP
    # One query, in the first column of a tile.
    column = tl.arange(0, FEW_QUERIES)
    query = tl.where(column == 0, first_query + row, end_query)
    inside = (exists & (id < count))[:, None] & (query < end_query)[None, :]
    inside = _allowed(codes.mask, ranges, range_count, id, query, inside)
    keys = _keys(queries, query_dims, codes, stride, id, query, inside, METRIC, PARTS, BITS)
    tl.store(members + row * k * GROUP + member, (tl.min(keys, axis=1).to(tl.int64) << 32) | id, mask=exists)


@triton.jit
def _allowed(mask, ranges, range_count, id, query, inside):
    """Which of the pairs `inside`, [codes, queries], the filters let through."""
    is_code = tl.max(inside.to(tl.int32), axis=1) > 0
    is_query = tl.max(inside.to(tl.int32), axis=0) > 0
    if mask is not None:
        inside &= (tl.load(mask + id, mask=is_code, other=0) != 0)[:, None]
    if ranges is not None:
        within = id[:, None] < query[None, :] * 0  # nothing
        for i in range(0, range_count):
            range_of = ranges + (query * range_count + i) * 2
            begin = tl.load(range_of, mask=is_query, other=0)
            end = tl.load(range_of + 1, mask=is_query, other=0)
            within |= (id[:, None] >= begin[None, :]) & (id[:, None] < end[None, :])
        inside &= within
    return inside


@triton.jit
def _keys(
    queries,
    query_dims,
    codes,
    stride,
    id,
    query,
    inside,
    METRIC: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
):
    """Keys of codes with queries, int32 [codes, queries]; NO_KEY for pairs that are not `inside`."""
    is_code = tl.max(inside.to(tl.int32), axis=1) > 0
    is_query = tl.max(inside.to(tl.int32), axis=0) > 0
    # Where nothing may be found nothing is multiplied.
    end_byte = tl.where(tl.max(is_code.to(tl.int32), axis=0) > 0, codes.plane_bytes, 0)
    rows = codes.data + id * stride
    part = queries.parts + query[None, :] * (PARTS * query_dims) + tl.arange(0, 8 * BLOCK_BYTES)[:, None]
    first = tl.zeros((id.shape[0], query.shape[0]), tl.int32)
    second = tl.zeros((id.shape[0], query.shape[0]), tl.int32)
    for byte in range(0, end_byte, BLOCK_BYTES):
        t = _centred(rows, is_code, byte, codes.plane_bytes, BITS)
        s = tl.load(part + byte * 8, mask=is_query[None, :], other=0)
        first = tl.dot(t, s, acc=first, out_dtype=tl.int32)
        if PARTS == 2:
            s = tl.load(part + query_dims + byte * 8, mask=is_query[None, :], other=0)
            second = tl.dot(t, s, acc=second, out_dtype=tl.int32)
    return tl.where(inside, _key(first, second, queries, codes, id, query, is_code, is_query, METRIC, PARTS), NO_KEY)


@triton.jit
def _centred(rows, is_row, first_byte, plane_bytes, BITS: tl.constexpr):
    """t of 8 * BLOCK_BYTES dimensions: int8 [rows, dimensions]."""
    byte = first_byte + tl.arange(0, BLOCK_BYTES)
    loaded = is_row[:, None] & (byte < plane_bytes)[None, :]
    shift = (7 - tl.arange(0, 8)).to(tl.uint8)[None, None, :]
    half: tl.constexpr = 1 << (BITS - 1)
    codes = tl.zeros((rows.shape[0], BLOCK_BYTES, 8), tl.uint8)
    for plane in tl.static_range(BITS):
        planes = tl.load(rows[:, None] + plane * plane_bytes + byte[None, :], mask=loaded, other=0)
        codes |= ((planes[:, :, None] >> shift) & 1) << (BITS - 1 - plane)
    return tl.reshape((codes - half).to(tl.int8, bitcast=True), (rows.shape[0], 8 * BLOCK_BYTES))


@triton.jit
def _key(first, second, queries, codes, id, query, is_code, is_query, METRIC: tl.constexpr, PARTS: tl.constexpr):
    """Keys from sum(t s) of the parts. With p the product of a query (of its parts),

    hamming   p, the distance
    sdc       float32(p) * codes.factors[id] * queries.factors[query], descending
    scalar    (((step p + lower f0) f1 + (lower dim + step sum) f2) + extra) + f3, descending, with float32(p) (of each
              part), lower, step, sum and extra = codes.factors[id, :4], and f0 to f3 = queries.factors[query, :4]
    """
    first = first * queries.scale + tl.load(queries.offsets + query * PARTS, mask=is_query, other=0)[None, :]
    if PARTS == 2:
        second = second * queries.scale + tl.load(queries.offsets + query * 2 + 1, mask=is_query, other=0)[None, :]
    if METRIC == "hamming":
        key = first
    elif METRIC == "sdc":
        product = first * 128 + second if PARTS == 2 else first
        norm = tl.load(codes.factors + id, mask=is_code, other=0.0)[:, None]
        query_norm = tl.load(queries.factors + query, mask=is_query, other=0.0)[None, :]
        key = _descending(product.to(tl.float32) * norm * query_norm)
    else:
        product = first.to(tl.float32)
        if PARTS == 2:
            product = product * 128.0 + second.to(tl.float32)
        lower = tl.load(codes.factors + id * 4, mask=is_code, other=0.0)[:, None]
        step = tl.load(codes.factors + id * 4 + 1, mask=is_code, other=0.0)[:, None]
        sum = tl.load(codes.factors + id * 4 + 2, mask=is_code, other=0.0)[:, None]
        extra = tl.load(codes.factors + id * 4 + 3, mask=is_code, other=0.0)[:, None]
        f0 = tl.load(queries.factors + query * 4, mask=is_query, other=0.0)[None, :]
        f1 = tl.load(queries.factors + query * 4 + 1, mask=is_query, other=0.0)[None, :]
        f2 = tl.load(queries.factors + query * 4 + 2, mask=is_query, other=0.0)[None, :]
        f3 = tl.load(queries.factors + query * 4 + 3, mask=is_query, other=0.0)[None, :]
        total = lower * tl.cast(codes.dim, tl.float32) + step * sum
        key = _descending((((step * product + lower * f0) * f1 + total * f2) + extra) + f3)
    return key


@triton.jit
def _descending(score):
    """The bits of scores as integers that fall as scores rise."""
    bits = score.to(tl.int32, bitcast=True)
    return ~(bits ^ ((bits >> 31) & 0x7FFFFFFF))
