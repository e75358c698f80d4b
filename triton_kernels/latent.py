"""Attention between tokens and latents in Triton, with heads of any width, forward and backward.

A program holds ROWS queries against a block of COLUMNS keys: the block's scores are made over all features and stay in
registers; the softmax goes from block to block by its running maximum and sum; and the weighted sums of the values are
made a few features at a time, so that no width of head is too large. Where there is one block, as with the 512 latents
of NV-Embed, each output is written once; where there are more, it waits for the next block in float32 memory.

The backward makes the probabilities again from the logarithm of their sum. `gradients` has queries as rows and keys as
columns, or the other way around, so it adds up what it owns and nothing is added atomically. Blocks of keys begin at
the first that is kept and end with the last: the order of every sum depends on the shapes and on what is kept, not on
padding.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastembed.ops._latent_heads import heads_each

# Said, because Triton's default for contracting a * b + c into one rounding changes between versions.
COMPILER = {"enable_fp_fusion": True}


class Blocks(NamedTuple):
    """How a kernel is cut: rows and columns of a block of scores, and features that are multiplied at a time."""

    rows: int
    columns: int
    chunk: int
    num_warps: int
    num_stages: int


# 64 x 256 float32 scores are 64 registers of each of 256 threads. So are 32 x 512: all latents of a head at once, which
# lets heads be added up. The backward holds two blocks of scores. float32 has no tensor-core product of its own
# precision, and its operands need twice the room.
FORWARD = Blocks(64, 256, 32, 8, 4)
FORWARD_FLOAT32 = Blocks(32, 64, 16, 8, 2)
FOLDED = Blocks(32, 512, 32, 8, 3)
BACKWARD = Blocks(64, 128, 32, 8, 3)
BACKWARD_FLOAT32 = Blocks(32, 64, 16, 8, 1)
# Compute capabilities whose blocks have 99 KB of shared memory: one stage less of FOLDED.
LITTLE_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))
# Hidden features that are gated and averaged together, and their tokens at a time.
GATED_FEATURES = 64
GATED_TOKENS = 32


def attention(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The contract of `fastembed.reference.latent.attention`."""
    batch, heads, queries, _ = query.shape
    blocks = _blocks(FORWARD if query.element_size() == 2 else FORWARD_FLOAT32, queries, key.shape[2])
    one_block = key.shape[2] <= blocks.columns
    shape = batch, heads, queries, value.shape[3]
    out = torch.zeros(shape, dtype=query.dtype if one_block else torch.float32, device=query.device)
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    _attend(query, key, value, None, keep, out, out.stride()[:3], lse, scale, 1, blocks)
    return out.to(query.dtype), lse


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The contract of `fastembed.reference.latent.attention_backward`."""
    queries, keys = query.shape[2], key.shape[2]
    deltas = (grad.float() * out.float()).sum(dim=-1)
    grad, query, key, value = map(_with_unit_stride, (grad, query, key, value))
    config = BACKWARD if query.element_size() == 2 else BACKWARD_FLOAT32
    by_query, by_key = (queries, query, grad), (keys, key, value)
    query_grad, _ = _gradients(by_query, by_key, keep, lse, deltas, scale, config, by_key=False)
    key_grad, value_grad = _gradients(by_key, by_query, keep, lse, deltas, scale, config, by_key=True)
    assert value_grad is not None
    return query_grad, key_grad, value_grad


def _gradients(
    row_side: tuple[int, Tensor, Tensor],
    column_side: tuple[int, Tensor, Tensor],
    keep: Tensor | None,
    lse: Tensor,
    deltas: Tensor,
    scale: float,
    config: Blocks,
    *,
    by_key: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the rows' first matrices and, by_key, of their second; a side is its length and its matrices."""
    rows, row_scores, row_slopes = row_side
    columns, column_scores, column_slopes = column_side
    batch, heads, _, features = row_scores.shape
    blocks = _blocks(config, rows, columns)
    dtype = row_scores.dtype if columns <= blocks.columns else torch.float32
    score_grad = torch.zeros(row_scores.shape, dtype=dtype, device=row_scores.device)
    slope_grad = torch.zeros(row_slopes.shape, dtype=dtype, device=row_slopes.device) if by_key else None
    if batch * heads * rows * columns > 0:
        with torch.cuda.device_of(row_scores):
            gradients[triton.cdiv(rows, blocks.rows), heads, batch](
                row_scores,
                row_slopes,
                column_scores,
                column_slopes,
                lse,
                deltas,
                keep,
                score_grad,
                slope_grad,
                rows,
                columns,
                features,
                row_slopes.shape[3],
                *row_scores.stride()[:3],
                *row_slopes.stride()[:3],
                *column_scores.stride()[:3],
                *column_slopes.stride()[:3],
                *_keep_strides(keep),
                scale,
                BY_KEY=by_key,
                ROWS=blocks.rows,
                COLUMNS=blocks.columns,
                CHUNK=blocks.chunk,
                num_warps=blocks.num_warps,
                num_stages=blocks.num_stages,
                **COMPILER,
            )
    return score_grad.to(row_scores.dtype), None if slope_grad is None else slope_grad.to(row_scores.dtype)


def attend_folded(normalized: Tensor, score_weight: Tensor, score_bias: Tensor, values: Tensor) -> Tensor:
    """sum over h of softmax(normalized score_weight[h]^T + score_bias[h]) values[h], float32 [N, D].

    normalized: [N, D]; score_weight and values: [H, L, D] in its dtype; score_bias: float32 [H, L].
    """
    heads, latents, _ = score_weight.shape
    tokens, dim = len(normalized), values.shape[2]
    config = FOLDED if normalized.element_size() == 2 else FORWARD_FLOAT32
    if normalized.is_cuda and torch.cuda.get_device_capability(normalized.device) in LITTLE_SHARED_MEMORY:
        config = config._replace(num_stages=2)
    blocks = _blocks(config, tokens, latents)
    # A program may go through its heads one after the other where each is a single block.
    each = heads_each(tokens, heads, blocks.rows) if latents <= blocks.columns else 1
    groups = triton.cdiv(heads, each)
    sums = normalized.new_empty(groups, tokens, dim, dtype=torch.float32)
    lse = normalized.new_empty(1, heads, tokens, dtype=torch.float32)
    query = normalized.expand(1, heads, tokens, -1)
    strides = (0, sums.stride(0), sums.stride(1))
    _attend(query, score_weight[None], values[None], score_bias, None, sums, strides, lse, 1.0, each, blocks)
    return sums.sum(dim=0) if groups > 1 else sums[0]


def gated_means(values: Tensor, gates: Tensor, bias: Tensor, gate_bias: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The means over each sequence of (values + bias) * gelu(gates + gate_bias), float32 [B, C].

    values, gates: [N, C]; bias, gate_bias: float32 [C]; cu_seqlens: int64 [B + 1].
    """
    tokens, features = values.shape
    values, gates, bias, gate_bias, offsets = (x.contiguous() for x in (values, gates, bias, gate_bias, cu_seqlens))
    means = values.new_empty(len(offsets) - 1, features, dtype=torch.float32)
    if means.numel() > 0:
        with torch.cuda.device_of(values):
            average_gated[len(means), triton.cdiv(features, GATED_FEATURES)](
                values,
                gates,
                bias,
                gate_bias,
                offsets,
                means,
                tokens,
                features,
                TOKENS=GATED_TOKENS,
                FEATURES=GATED_FEATURES,
                num_warps=4,
                **COMPILER,
            )
    return means


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    keep: Tensor | None,
    out: Tensor,
    out_strides: tuple[int, ...],
    lse: Tensor,
    scale: float,
    heads_each: int,
    blocks: Blocks,
) -> None:
    batch, heads, queries, features = query.shape
    keys, value_features = value.shape[2:]
    if batch * heads * queries == 0 or keys == 0:
        out.zero_()
        lse.fill_(math.inf)
        return
    query, key, value = map(_with_unit_stride, (query, key, value))
    with torch.cuda.device_of(query):
        attend[triton.cdiv(queries, blocks.rows), triton.cdiv(heads, heads_each), batch](
            query,
            key,
            value,
            bias,
            keep,
            out,
            lse,
            heads,
            heads_each,
            queries,
            keys,
            features,
            value_features,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *out_strides,
            *_keep_strides(keep),
            scale,
            ROWS=blocks.rows,
            COLUMNS=blocks.columns,
            CHUNK=blocks.chunk,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
            **COMPILER,
        )


def _blocks(config: Blocks, rows: int, columns: int) -> Blocks:
    """The configuration, no larger than the problem."""
    rows = min(config.rows, max(16, triton.next_power_of_2(rows)))
    columns = min(config.columns, max(16, triton.next_power_of_2(columns)))
    return config._replace(rows=rows, columns=columns, num_warps=config.num_warps if rows * columns >= 64 * 64 else 4)


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _keep_strides(keep: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if keep is None else keep.stride()


@triton.jit
def attend(
    query,
    key,
    value,
    bias,
    keep,
    out,
    lse,
    heads,
    heads_each,
    queries,
    keys,
    features,
    value_features,
    query_batch_stride,
    query_head_stride,
    query_stride,
    key_batch_stride,
    key_head_stride,
    key_stride,
    value_batch_stride,
    value_head_stride,
    value_stride,
    out_batch_stride,
    out_group_stride,
    out_stride,
    keep_batch_stride,
    keep_stride,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """out = softmax(scale * query key^T + bias) value over the kept keys, added up over the `heads_each` heads of a
    group, and lse, the logarithm of the softmax's sum (infinity without a key, whose output is zero).

    query: [batch, heads, queries, features]; key: [.., keys, features]; value: [.., keys, value_features]; bias:
    [heads, keys] or None; keep: [batch, keys] or None; out: [batch, groups, queries, value_features], zero before where
    nothing may be kept. With more than COLUMNS keys a group is one head, and out is float32.
    Grid: (blocks of queries, groups of heads, batch).
    """
    batch = tl.program_id(2).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_inside = row < queries
    first_key, end = _span(keep, batch * keep_batch_stride, keep_stride, keys, COLUMNS)
    target = out + batch * out_batch_stride + group * out_group_stride + row * out_stride
    first_head = group * heads_each
    for head in range(first_head, tl.minimum(first_head + heads_each, heads)):
        source = query + batch * query_batch_stride + head * query_head_stride + row * query_stride
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        for block in range(first_key, end, COLUMNS):
            column = block + tl.arange(0, COLUMNS).to(tl.int64)
            kept = _kept(keep, batch * keep_batch_stride, keep_stride, column, end)
            keys_of = key + batch * key_batch_stride + head * key_head_stride + column * key_stride
            scores = _products(source, row_inside, keys_of, kept, features, ROWS, COLUMNS, CHUNK) * scale
            if bias is not None:
                scores += tl.load(bias + head * keys + column, mask=kept, other=0.0)[None, :]
            scores = tl.where(kept[None, :], scores, float("-inf"))
            newest = tl.maximum(largest, tl.max(scores, axis=1))
            origin = tl.where(newest == float("-inf"), 0.0, newest)
            weights = tl.exp(scores - origin[:, None])
            shrunk = tl.exp(largest - origin)
            total = total * shrunk + tl.sum(weights, axis=1)
            largest = newest
            # The last block divides by the sum; what other heads left is whole already.
            factor = tl.where(block + COLUMNS < end, 1.0, tl.where(total == 0, 0.0, 1.0 / total))
            carried = tl.where(block > first_key, shrunk * factor, 1.0)
            values = value + batch * value_batch_stride + head * value_head_stride + column * value_stride
            tl.debug_barrier()  # what is added to may have been written by other threads
            _add_weighted(
                weights.to(value.dtype.element_ty),
                values,
                kept,
                target,
                row_inside,
                value_features,
                factor,
                carried,
                (block == first_key) & (head == first_head),
                CHUNK,
            )
        logarithm = tl.where(total == 0, float("inf"), largest + tl.log(total))
        tl.store(lse + (batch * heads + head) * queries + row, logarithm, mask=row_inside)


@triton.jit
def gradients(
    row_scores,
    row_slopes,
    column_scores,
    column_slopes,
    lse,
    deltas,
    keep,
    score_grad,
    slope_grad,
    rows,
    columns,
    features,
    slope_features,
    row_scores_batch_stride,
    row_scores_head_stride,
    row_scores_stride,
    row_slopes_batch_stride,
    row_slopes_head_stride,
    row_slopes_stride,
    column_scores_batch_stride,
    column_scores_head_stride,
    column_scores_stride,
    column_slopes_batch_stride,
    column_slopes_head_stride,
    column_slopes_stride,
    keep_batch_stride,
    keep_stride,
    scale,
    BY_KEY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """With P = exp(scale * scores - lse) and dS = P (slopes - deltas), rows by columns: score_grad = scale * dS
    column_scores and, BY_KEY, slope_grad = P column_slopes.

    Scores are the products of row_scores and column_scores, slopes those of row_slopes and column_slopes: query and
    key, grad and value; BY_KEY, where rows are keys, key and query, value and grad. lse, deltas: float32 [batch,
    heads, queries]; deltas are the sums of grad * out. The gradients are contiguous, zero before, and float32 where
    there are more than COLUMNS columns. Others as in `attend`. Grid: (blocks of rows, heads, batch).
    """
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    of_head = batch * tl.num_programs(1) + head
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    first = tl.full((), 0, tl.int32)
    end = first + columns
    if BY_KEY:
        inside = _kept(keep, batch * keep_batch_stride, keep_stride, row, rows)
        end = tl.where(tl.max(inside.to(tl.int32)) == 0, 0, end)
    else:
        first, end = _span(keep, batch * keep_batch_stride, keep_stride, columns, COLUMNS)
        logarithm = tl.load(lse + of_head * rows + row, mask=inside, other=float("inf"))[:, None]
        delta = tl.load(deltas + of_head * rows + row, mask=inside, other=0.0)[:, None]
    row_scores += batch * row_scores_batch_stride + head * row_scores_head_stride + row * row_scores_stride
    row_slopes += batch * row_slopes_batch_stride + head * row_slopes_head_stride + row * row_slopes_stride
    column_scores += batch * column_scores_batch_stride + head * column_scores_head_stride
    column_slopes += batch * column_slopes_batch_stride + head * column_slopes_head_stride
    factor = tl.full((ROWS,), scale, tl.float32)
    one = tl.full((ROWS,), 1.0, tl.float32)
    for block in range(first, end, COLUMNS):
        column = block + tl.arange(0, COLUMNS).to(tl.int64)
        if BY_KEY:
            wanted = column < end
            logarithm = tl.load(lse + of_head * columns + column, mask=wanted, other=float("inf"))[None, :]
            delta = tl.load(deltas + of_head * columns + column, mask=wanted, other=0.0)[None, :]
            known = inside[:, None]  # the other way around the logarithm is infinite
        else:
            wanted = _kept(keep, batch * keep_batch_stride, keep_stride, column, end)
            known = wanted[None, :]
        of_scores = column_scores + column * column_scores_stride
        of_slopes = column_slopes + column * column_slopes_stride
        scores = _products(row_scores, inside, of_scores, wanted, features, ROWS, COLUMNS, CHUNK) * scale
        weights = tl.where(known, tl.exp(scores - logarithm), 0.0)
        slopes = _products(row_slopes, inside, of_slopes, wanted, slope_features, ROWS, COLUMNS, CHUNK)
        slopes = tl.where(known, weights * (slopes - delta), 0.0)
        tl.debug_barrier()  # what is added to may have been written by other threads
        _add_weighted(
            slopes.to(column_scores.dtype.element_ty),
            of_scores,
            wanted,
            score_grad + (of_head * rows + row) * features,
            inside,
            features,
            factor,
            one,
            block == first,
            CHUNK,
        )
        if BY_KEY:
            _add_weighted(
                weights.to(column_slopes.dtype.element_ty),
                of_slopes,
                wanted,
                slope_grad + (of_head * rows + row) * slope_features,
                inside,
                slope_features,
                one,
                one,
                block == first,
                CHUNK,
            )


@triton.jit
def average_gated(
    values,
    gates,
    bias,
    gate_bias,
    offsets,
    means,
    tokens,
    features,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """See `gated_means`. Grid: (sequences, blocks of features)."""
    sequence = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    within = feature < features
    begin = tl.minimum(tl.maximum(tl.load(offsets + sequence), 0), tokens)
    end = tl.minimum(tl.maximum(tl.load(offsets + sequence + 1), 0), tokens)
    value_bias = tl.load(bias + feature, mask=within, other=0.0)[None, :]
    other_bias = tl.load(gate_bias + feature, mask=within, other=0.0)[None, :]
    sums = tl.zeros((TOKENS, FEATURES), tl.float32)
    for first in range(begin, end, TOKENS):
        token = first + tl.arange(0, TOKENS).to(tl.int64)
        wanted = (token < end)[:, None] & within[None, :]
        spot = token[:, None] * features + feature[None, :]
        value = tl.load(values + spot, mask=wanted, other=0.0).to(tl.float32) + value_bias
        gate = tl.load(gates + spot, mask=wanted, other=0.0).to(tl.float32) + other_bias
        gelu = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
        sums += tl.where(wanted, value * gelu, 0.0)
    mean = tl.sum(sums, axis=0) / tl.maximum(end - begin, 1).to(tl.float32)
    tl.store(means + sequence * features + feature, mean, mask=within)


@triton.jit
def _span(keep, offset, stride, keys, COLUMNS: tl.constexpr):
    """Of the kept keys the first, and the end behind the last; nothing lies between where none is kept."""
    first = tl.full((), 0, tl.int32)
    end = first + keys
    if keep is not None:
        first, end = end, first
        for block in range(0, keys, COLUMNS):
            column = block + tl.arange(0, COLUMNS)
            kept = _kept(keep, offset, stride, column.to(tl.int64), keys)
            first = tl.minimum(first, tl.min(tl.where(kept, column, keys)))
            end = tl.maximum(end, tl.max(tl.where(kept, column + 1, 0)))
    return first, end


@triton.jit
def _kept(keep, offset, stride, column, keys):
    kept = column < keys
    if keep is not None:
        kept &= tl.load(keep + offset + column * stride, mask=kept, other=0) != 0
    return kept


@triton.jit
def _products(
    rows, row_inside, columns, column_inside, features, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr
):
    """Each row by each column: float32 [ROWS, COLUMNS]. rows, columns: pointers to their first features."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, features, CHUNK):
        feature = first + tl.arange(0, CHUNK)
        within = feature < features
        left = tl.load(rows[:, None] + feature[None, :], mask=row_inside[:, None] & within[None, :], other=0.0)
        right = tl.load(columns[None, :] + feature[:, None], mask=column_inside[None, :] & within[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def _add_weighted(
    weights, columns, column_inside, out, row_inside, features, factor, carried, is_first, CHUNK: tl.constexpr
):
    """out = weights columns * factor + out * carried, without the last term if is_first.

    weights: [ROWS, COLUMNS]; columns: pointers to the first of `features` values; out: pointers to where those of each
    row go; factor, carried: [ROWS].
    """
    for first in range(0, features, CHUNK):
        feature = first + tl.arange(0, CHUNK)
        within = feature < features
        right = tl.load(columns[:, None] + feature[None, :], mask=column_inside[:, None] & within[None, :], other=0.0)
        added = tl.dot(weights, right, input_precision="ieee") * factor[:, None]
        spot = out[:, None] + feature[None, :]
        wanted = row_inside[:, None] & within[None, :]
        before = tl.load(spot, mask=wanted & (is_first == 0), other=0.0).to(tl.float32)
        added += before * carried[:, None]
        tl.store(spot, added.to(out.dtype.element_ty), mask=wanted)
