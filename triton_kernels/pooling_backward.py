"""The backward of multi-exit pooling in Triton: two launches for all exits and up to eight dims of each.

`gather_prefixes` turns the gradients of all prefixes of a pooled vector into that of the vector, through truncation,
normalisation and the mode's division; `write_tokens` writes every gradient of the hidden states once, whole tiles of
tokens and columns: the weight of the token times the gradient of its sequence, zeros elsewhere. Nothing of the hidden
states is read. A token finds its sequence, not the other way round: whatever the offsets hold, each gradient is written
by one program, and none is left out.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pooling import (
    COMPILER,
    DIMS_PER_LAUNCH,
    EPS,
    EXITS_PER_LAUNCH,
    _pick,
    _sequence,
    _valid_tokens,
    by_rank,
    readable,
)

# A tile is BLOCK_TOKENS tokens by TILE_BYTES of each.
BLOCK_TOKENS = tl.constexpr(32)
TILE_BYTES = 256


def pool_exits_backward(
    state: Sequence[Tensor],
    grads: Sequence[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    tokens: int,
    sizes: Sequence[int],
    dtype: torch.dtype,
    mode: str,
    dims: Sequence[Sequence[int]],
    normalize: bool,
) -> list[Tensor]:
    """Gradients of the hidden states; the same contract as `fastembed.reference.pooling.pool_exits_backward`, except
    that the values of `attention_mask` and `cu_seqlens` are not checked (that would wait for the GPU)."""
    first = state[0]
    rows = len(first)
    leading = (rows, tokens) if cu_seqlens is None else (tokens,)
    results = [first.new_empty((*leading, size), dtype=dtype) for size in sizes]
    if rows == 0 or tokens == 0:
        return [result.zero_() for result in results]
    attention_mask, cu_seqlens = readable(attention_mask, cu_seqlens)
    remaining = iter(grads)
    grads_by_exit = [[next(remaining).contiguous() for _ in exit_dims] for exit_dims in dims]
    with torch.cuda.device_of(first):
        for start in range(0, len(sizes), EXITS_PER_LAUNCH):
            exits = slice(start, start + EXITS_PER_LAUNCH)
            _group_backward(
                tuple(state[: len(sizes)][exits]),
                tuple(state[len(sizes) :][exits]) or None,
                grads_by_exit[exits],
                attention_mask,
                cu_seqlens,
                tokens,
                mode,
                dims[exits],
                normalize,
                tuple(results[exits]),
            )
    return results


def _group_backward(
    pooled: tuple[Tensor, ...],
    winners: tuple[Tensor, ...] | None,
    grads: list[list[Tensor]],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    tokens: int,
    mode: str,
    dims: Sequence[Sequence[int]],
    normalize: bool,
    results: tuple[Tensor, ...],
) -> None:
    rows = len(pooled[0])
    widths = tuple(vectors.shape[1] for vectors in pooled)
    mask_strides = (0, 0) if attention_mask is None else (0, *attention_mask.stride())[-2:]
    block_dim = max(128, triton.next_power_of_2(max(widths)))
    of_pooled = pooled[0].new_empty(len(pooled), rows, block_dim)
    anchors = pooled[0].new_empty(rows, dtype=torch.int64)
    launches = range(0, max(map(len, dims)), DIMS_PER_LAUNCH)
    for start in launches:
        chunk = slice(start, start + DIMS_PER_LAUNCH)
        gather_prefixes[rows, len(pooled)](
            pooled,
            by_rank([exit_grads[chunk] for exit_grads in grads], grads[0][0]),
            by_rank([exit_dims[chunk] for exit_dims in dims], 0),
            widths,
            attention_mask,
            cu_seqlens,
            of_pooled,
            anchors,
            rows,
            tokens,
            *mask_strides,
            MODE=mode,
            NORMALIZE=normalize,
            FIRST=start == 0,
            LAST=start == launches[-1],
            BLOCK_DIM=block_dim,
            num_warps=min(32, block_dim // 128),
            **COMPILER,
        )

    sizes = tuple(result.shape[-1] for result in results)
    all_tokens = results[0].numel() // sizes[0]
    tile_dim = min(TILE_BYTES // results[0].element_size(), triton.next_power_of_2(max(sizes)))
    write_tokens[triton.cdiv(all_tokens, BLOCK_TOKENS.value), triton.cdiv(max(sizes), tile_dim), len(results)](
        of_pooled,
        winners,
        anchors,
        attention_mask,
        cu_seqlens,
        results,
        sizes,
        widths,
        rows,
        tokens,
        all_tokens,
        rows.bit_length(),
        *mask_strides,
        MODE=mode,
        ROW=block_dim,
        BLOCK_DIM=tile_dim,
        num_warps=4,
        **COMPILER,
    )


@triton.jit
def gather_prefixes(
    pooled,
    grads,
    dims,
    widths,
    mask,
    cu_seqlens,
    of_pooled,
    anchors,
    rows,
    tokens,
    mask_row_stride,
    mask_token_stride,
    MODE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """of_pooled[e, b] = sum over k of (dy_k - y_k (y_k . dy_k)) / n_k, over the divisor of the mode

    with y_k = p[:k] / n_k, n_k = max(||p[:k]||, 1e-12), without the second term where 1e-12 is larger; dy_k alone if
    not NORMALIZE. FIRST and LAST say whether other launches have added, or will add, further prefixes. anchors[b] is
    the token that "cls" or "lasttoken" takes, or from which "weightedmean" counts.

    pooled: one pointer per exit, [rows, widths[e]]; grads[k][e]: [rows, dims[k][e]]. Grid: (rows, exits).
    """
    row = tl.program_id(0).to(tl.int64)
    exit = tl.program_id(1)
    columns = tl.arange(0, BLOCK_DIM)
    width = _pick(widths, exit)
    vector = tl.load(_pick(pooled, exit) + row * width + columns, mask=columns < width, other=0.0)
    target = of_pooled + (exit.to(tl.int64) * rows + row) * BLOCK_DIM + columns
    total = tl.zeros((BLOCK_DIM,), tl.float32)
    if not FIRST:
        total = tl.load(target)
    for k in tl.static_range(len(grads)):
        dim = _pick(dims[k], exit)
        inside = columns < dim
        grad = tl.load(_pick(grads[k], exit) + row * dim + columns, mask=inside, other=0.0).to(tl.float32)
        if NORMALIZE:
            norm = tl.sqrt_rn(tl.sum(tl.where(inside, vector * vector, 0.0), axis=0))
            divisor = tl.where(norm < EPS, EPS, norm)  # a NaN norm stays NaN
            unit = tl.where(inside, tl.div_rn(vector, divisor), 0.0)
            along = tl.where(norm > EPS, tl.sum(unit * grad, axis=0), 0.0)
            grad = tl.where(inside, tl.div_rn(grad - unit * along, divisor), 0.0)
        total += grad
    if LAST:
        start, length = _sequence(cu_seqlens, row, tokens)
        mask_row = None if mask is None else mask + row * mask_row_stride + start * mask_token_stride
        first, last, count, weights = _valid_tokens(mask_row, mask_token_stride, length)
        if MODE == "mean" or MODE == "mean_sqrt_len" or MODE == "weightedmean":
            whole = tl.maximum(weights if MODE == "weightedmean" else count, 1).to(tl.float32)
            total = tl.div_rn(total, tl.sqrt_rn(whole) if MODE == "mean_sqrt_len" else whole)
        tl.store(anchors + row, last if MODE == "lasttoken" else first, mask=exit == 0)
    tl.store(target, total)


@triton.jit
def write_tokens(
    of_pooled,
    winners,
    anchors,
    mask,
    cu_seqlens,
    results,
    sizes,
    widths,
    rows,
    tokens,
    all_tokens,
    search_steps,
    mask_row_stride,
    mask_token_stride,
    MODE: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """results[e][token] = w * of_pooled[e, b] in the first widths[e] columns, b being the sequence of the token; zeros
    beyond them and for tokens that do not count, and for "max" where winners[e][b] names another token.

    With w = 1, or (t - anchors[b] + 1) for "weightedmean", or whether t = anchors[b] for "cls" and "lasttoken".
    results: one pointer per exit, [all_tokens, sizes[e]]. Grid: (blocks of tokens, blocks of columns, exits).
    """
    exit = tl.program_id(2)
    columns = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    exists = token < all_tokens

    if cu_seqlens is None:
        sequence = token // tokens
        start = sequence * 0
        position = token - sequence * tokens
        valid = exists
    else:
        # The last sequence that starts at the token or before it.
        sequence = token * 0
        above = sequence + rows
        for _ in range(0, search_steps):
            middle = (sequence + above) // 2
            inner = exists & (above - sequence > 1)
            starts = tl.load(cu_seqlens + middle, mask=inner, other=0).to(tl.int64)
            sequence = tl.where(inner & (starts <= token), middle, sequence)
            above = tl.where(inner & (starts > token), middle, above)
        start = tl.maximum(tl.load(cu_seqlens + sequence, mask=exists, other=0).to(tl.int64), 0)
        end = tl.load(cu_seqlens + sequence + 1, mask=exists, other=0).to(tl.int64)
        position = token - start
        valid = exists & (token >= start) & (token < end)
    if mask is not None:
        place = sequence * mask_row_stride + (start + position) * mask_token_stride
        valid &= tl.load(mask + place, mask=valid, other=0) != 0
    weight = tl.full((BLOCK_TOKENS,), 1.0, tl.float32)
    if MODE == "cls" or MODE == "lasttoken":
        valid &= tl.load(anchors + sequence, mask=valid, other=-1) == position
    if MODE == "weightedmean":
        weight = (position - tl.load(anchors + sequence, mask=valid, other=0) + 1).to(tl.float32)

    width = _pick(widths, exit)
    taken = valid[:, None] & (columns < width)[None, :]
    source = of_pooled + (exit.to(tl.int64) * rows + sequence)[:, None] * ROW + columns[None, :]
    if winners is not None:
        winner = tl.load(_pick(winners, exit) + sequence[:, None] * width + columns[None, :], mask=taken, other=-1)
        taken &= winner == position.to(tl.int32)[:, None]
    grad = tl.load(source, mask=taken, other=0.0)
    value = tl.where(taken, grad * weight[:, None], 0.0)
    size = _pick(sizes, exit)
    result = _pick(results, exit)
    target = result + token[:, None] * size + columns[None, :]
    tl.store(target, value.to(result.dtype.element_ty), mask=exists[:, None] & (columns < size)[None, :])
