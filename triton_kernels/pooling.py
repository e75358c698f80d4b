"""Multi-exit pooling in Triton: two launches for all exits and dims, one for the modes that pick a token.

`reduce_tokens` sums (or takes the maximum of) the valid tokens of one piece of a sequence, for one block of columns of
one exit, into a float32 workspace; `finish_rows` joins the pieces in a fixed order, divides, and writes every
normalised prefix, as floats, int8 or packed bits, from the one vector it holds in registers. Nothing is added
atomically and a sequence is cut by its own length only, so a result depends neither on scheduling nor on the other
sequences of the batch. Nothing waits for the GPU: the values of the mask and of `cu_seqlens` are only ever read in the
kernels, which treat any non-zero mask value as valid and clamp offsets to the tokens that exist.

The backward is in `pooling_backward`.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastembed.reference.pooling import NORM_EPS

# A tile is BLOCK_TOKENS tokens by TILE_BYTES of each: four 16-byte loads in flight per thread, whole sectors per token.
BLOCK_TOKENS = tl.constexpr(32)
TILE_BYTES = 256
# Sequences longer than MIN_PIECE tokens are cut, so that a few long ones still occupy the whole GPU.
MIN_PIECE = tl.constexpr(512)
MAX_PIECES = tl.constexpr(8)
# Mask values read at a time where a whole row of the mask is scanned.
BLOCK_MASK = tl.constexpr(1024)
# Stands for no token where the first of several is looked for.
NO_TOKEN = tl.constexpr(2**31 - 1)
EPS = tl.constexpr(NORM_EPS)

# Each exit adds a pointer, and each dim of it another, to the kernels' arguments (4 KiB in all on older drivers).
EXITS_PER_LAUNCH = 8
DIMS_PER_LAUNCH = 8

# Said, because Triton's default for contracting a * b + c into one rounding changes between versions.
COMPILER = {"enable_fp_fusion": True}


def pool_exits(
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    mode: str,
    dims: Sequence[Sequence[int]],
    normalize: bool,
    out_dtype: torch.dtype,
    keep_state: bool = False,
) -> list[Tensor]:
    """Pool every exit; the same contract as `fastembed.reference.pooling.pool_exits`, except that the values of
    `attention_mask` and `cu_seqlens` are not checked (that would wait for the GPU)."""
    first = hidden_states[0]
    rows = first.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    attention_mask, cu_seqlens = readable(attention_mask, cu_seqlens)
    outputs = [
        [
            first.new_empty(rows, triton.cdiv(dim, 8) if out_dtype == torch.uint8 else dim, dtype=out_dtype)
            for dim in exit_dims
        ]
        for exit_dims in dims
    ]
    state: list[Tensor] = []
    if keep_state:
        shapes = [(rows, max(exit_dims)) for exit_dims in dims]
        state += [first.new_empty(shape, dtype=torch.float32) for shape in shapes]
        state += [first.new_empty(shape, dtype=torch.int32) for shape in shapes] if mode == "max" else []
    if rows > 0:
        with torch.cuda.device_of(first):
            for exits in _launch_groups(hidden_states, dims):
                _pool_group(
                    [hidden_states[i] for i in exits],
                    attention_mask,
                    cu_seqlens,
                    mode,
                    [dims[i] for i in exits],
                    normalize,
                    [outputs[i] for i in exits],
                    tuple(state[i] for i in exits) if keep_state else None,
                    tuple(state[len(dims) + i] for i in exits) if keep_state and mode == "max" else None,
                )
    return [output for exit_outputs in outputs for output in exit_outputs] + state


def readable(attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Mask and offsets as the kernels can read them."""
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()  # not every architecture compares every float8
    return attention_mask, cu_seqlens


def _launch_groups(hidden_states: Sequence[Tensor], dims: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Exits that one launch can serve: of one dtype and memory layout, and not too many."""
    by_layout: dict[tuple[object, ...], list[int]] = {}
    for index, (hidden, exit_dims) in enumerate(zip(hidden_states, dims, strict=True)):
        if exit_dims:
            by_layout.setdefault((hidden.dtype, hidden.stride()), []).append(index)
    for exits in by_layout.values():
        for start in range(0, len(exits), EXITS_PER_LAUNCH):
            yield exits[start : start + EXITS_PER_LAUNCH]


def _pool_group(
    hidden_states: list[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    mode: str,
    dims: list[Sequence[int]],
    normalize: bool,
    outputs: list[list[Tensor]],
    pooled: tuple[Tensor, ...] | None,
    winners: tuple[Tensor, ...] | None,
) -> None:
    hidden = hidden_states[0]
    rows = len(outputs[0][0])
    tokens = hidden.shape[-2]
    row_stride = 0 if cu_seqlens is not None else hidden.stride(0)
    mask_strides = (0, 0) if attention_mask is None else (0, *attention_mask.stride())[-2:]
    layout = (tokens, row_stride, hidden.stride(-2), hidden.stride(-1), *mask_strides)
    widths = tuple(max(exit_dims) for exit_dims in dims)
    width = max(widths)
    sources = (tuple(hidden_states), attention_mask, cu_seqlens)

    partials = partial_winners = None
    if mode not in ("cls", "lasttoken"):
        # Half as much where every value has its token beside it.
        tile_bytes = TILE_BYTES if winners is None else TILE_BYTES // 2
        block_dim = min(tile_bytes // hidden.element_size(), triton.next_power_of_2(width))
        column_blocks = triton.cdiv(width, block_dim)
        pieces = min(MAX_PIECES.value, max(1, triton.cdiv(tokens, MIN_PIECE.value)))
        partials = hidden.new_empty(len(dims), pieces, rows, column_blocks * block_dim, dtype=torch.float32)
        if winners is not None:
            partial_winners = torch.empty_like(partials, dtype=torch.int32)
        reduce_tokens[rows * column_blocks, pieces, len(dims)](
            *sources,
            partials,
            partial_winners,
            widths,
            rows,
            column_blocks,
            *layout,
            MODE=mode,
            BLOCK_DIM=block_dim,
            num_warps=4,
            **COMPILER,
        )

    block_dim = max(128, triton.next_power_of_2(width))
    for start in range(0, max(map(len, dims)), DIMS_PER_LAUNCH):
        chunk = slice(start, start + DIMS_PER_LAUNCH)
        finish_rows[rows, len(dims)](
            *sources,
            partials,
            partial_winners,
            pooled if start == 0 else None,
            winners if start == 0 else None,
            by_rank([exit_outputs[chunk] for exit_outputs in outputs], outputs[0][0]),
            by_rank([exit_dims[chunk] for exit_dims in dims], 0),
            widths,
            rows,
            0 if partials is None else partials.stride(0),
            0 if partials is None else partials.stride(2),
            *layout,
            MODE=mode,
            NORMALIZE=normalize,
            OUTPUT={torch.int8: "int8", torch.uint8: "bits"}.get(outputs[0][0].dtype, "float"),
            BLOCK_DIM=block_dim,
            num_warps=min(32, max(1, block_dim // 512)),
            **COMPILER,
        )


def by_rank(per_exit: Sequence[Sequence[object]], filler: object) -> tuple[tuple[object, ...], ...]:
    """Transpose lists of different lengths: the first entry of every exit, then the second, ..., filled up."""
    longest = max(map(len, per_exit))
    return tuple(tuple(entries[k] if k < len(entries) else filler for entries in per_exit) for k in range(longest))


@triton.jit
def reduce_tokens(
    hidden,
    mask,
    cu_seqlens,
    partials,
    partial_winners,
    widths,
    rows,
    column_blocks,
    tokens,
    row_stride,
    token_stride,
    dim_stride,
    mask_row_stride,
    mask_token_stride,
    MODE: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """partials[e, s, b, d] = sum over the valid tokens t in piece s of sequence b of w_t * hidden[e][b, t, d]

    with w_t = 1, or t - (first valid token) + 1 for "weightedmean"; for "max" the maximum instead of the sum, NaN if
    any is NaN, -inf without a valid token, and in partial_winners, if wanted, the first t it is of. Padding is never
    loaded. Summed in float32: 32 interleaved sums per column, then a tree over them.

    hidden: one pointer per exit, [rows, tokens, D] or packed [tokens, D]; mask: [rows, tokens] or None; cu_seqlens:
    [rows + 1] or None; widths: columns wanted of each exit; strides in elements.
    Grid: (rows * column_blocks, pieces, exits).
    """
    row = (tl.program_id(0) // column_blocks).to(tl.int64)
    piece = tl.program_id(1)
    exit = tl.program_id(2)
    columns = tl.program_id(0) % column_blocks * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    wanted = columns < _pick(widths, exit)

    start, length = _sequence(cu_seqlens, row, tokens)
    piece_length = _piece_length(length)
    begin = piece * piece_length
    end = tl.minimum(begin + piece_length, length)
    mask_row = None if mask is None else mask + row * mask_row_stride + start * mask_token_stride
    source = _pick(hidden, exit) + row * row_stride + start * token_stride + columns.to(tl.int64)[None, :] * dim_stride

    if MODE == "weightedmean":
        first, _, _, _ = _valid_tokens(mask_row, mask_token_stride, length)
    total = tl.full((BLOCK_TOKENS, BLOCK_DIM), float("-inf") if MODE == "max" else 0.0, tl.float32)
    if partial_winners is not None:
        winner = tl.full((BLOCK_TOKENS, BLOCK_DIM), NO_TOKEN, tl.int32)
    for block in range(begin, end, BLOCK_TOKENS):
        token = block + tl.arange(0, BLOCK_TOKENS)
        valid = token < end
        if mask is not None:
            valid &= tl.load(mask_row + token * mask_token_stride, mask=valid, other=0) != 0
        loaded = valid[:, None] & wanted[None, :]
        values = tl.load(source + token[:, None] * token_stride, mask=loaded, other=0.0).to(tl.float32)
        if MODE == "max":
            values = tl.where(loaded, values, float("-inf"))
            if partial_winners is not None:
                wins = loaded & (_is_larger(values, total) | (winner == NO_TOKEN))
                winner = tl.where(wins, token.to(tl.int32)[:, None], winner)
            total = tl.maximum(total, values, propagate_nan=tl.PropagateNan.ALL)
        elif MODE == "weightedmean":
            total += values * (token - first + 1).to(tl.float32)[:, None]
        else:
            total += values

    if MODE == "max":
        is_nan = total != total
        largest = tl.max(tl.where(is_nan, float("-inf"), total), axis=0)
        reduced = tl.where(tl.max(is_nan.to(tl.int32), axis=0) > 0, float("nan"), largest)
    else:
        reduced = tl.sum(total, axis=0)
    if partial_winners is not None:
        is_reduced = (total == reduced[None, :]) | (is_nan & (reduced != reduced)[None, :])
        winner = tl.min(tl.where(is_reduced, winner, NO_TOKEN), axis=0)
    slot = (exit.to(tl.int64) * tl.num_programs(1) + piece) * rows + row
    tl.store(partials + slot * (column_blocks * BLOCK_DIM) + columns, reduced)
    if partial_winners is not None:
        tl.store(partial_winners + slot * (column_blocks * BLOCK_DIM) + columns, winner)


@triton.jit
def finish_rows(
    hidden,
    mask,
    cu_seqlens,
    partials,
    partial_winners,
    states,
    winners,
    outputs,
    dims,
    widths,
    rows,
    partial_exit_stride,
    partial_row_stride,
    tokens,
    row_stride,
    token_stride,
    dim_stride,
    mask_row_stride,
    mask_token_stride,
    MODE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OUTPUT: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """outputs[k][e][b] = p[:dim] / max(||p[:dim]||_2, 1e-12), dim = dims[k][e], without the division if not NORMALIZE,

    where p is, for sequence b of exit e, the sum of the pieces over the count of valid tokens ("mean"), its root
    ("mean_sqrt_len") or the sum of the weights ("weightedmean"), the maximum of the pieces ("max"), or the first or
    last valid token itself ("cls", "lasttoken", which need no partials); zeros without a valid token. Every norm is a
    float32 sum over the same squares, and rounding to the output's dtype comes last. With OUTPUT "int8" instead
    127 p / max |p|, rounded, zeros if that maximum is 0 or not finite; with "bits" eight signs to a byte.

    states[e], winners[e]: p and, for "max", the first token that each value is of, if wanted; [rows, widths[e]].

    Grid: (rows, exits). Other arguments as in `reduce_tokens`.
    """
    row = tl.program_id(0).to(tl.int64)
    exit = tl.program_id(1)
    columns = tl.arange(0, BLOCK_DIM)

    start, length = _sequence(cu_seqlens, row, tokens)
    mask_row = None if mask is None else mask + row * mask_row_stride + start * mask_token_stride
    first, last, count, weights = _valid_tokens(mask_row, mask_token_stride, length)
    wanted = columns < tl.where(count > 0, _pick(widths, exit), 0)

    if winners is not None:
        winner = tl.full((BLOCK_DIM,), NO_TOKEN, tl.int32)
    if MODE == "cls" or MODE == "lasttoken":
        token = start + (first if MODE == "cls" else last)
        source = _pick(hidden, exit) + row * row_stride + token * token_stride
        pooled = tl.load(source + columns.to(tl.int64) * dim_stride, mask=wanted, other=0.0).to(tl.float32)
    else:
        place = exit.to(tl.int64) * partial_exit_stride + row * partial_row_stride + columns
        source = partials + place
        pooled = tl.load(source, mask=wanted, other=0.0)
        if winners is not None:
            winner = tl.load(partial_winners + place, mask=wanted, other=NO_TOKEN)
        for piece in range(1, tl.cdiv(length, _piece_length(length))):
            values = tl.load(source + piece * rows * partial_row_stride, mask=wanted, other=0.0)
            if winners is not None:
                later = tl.load(
                    partial_winners + place + piece * rows * partial_row_stride, mask=wanted, other=NO_TOKEN
                )
                winner = tl.where(_is_larger(values, pooled) | (winner == NO_TOKEN), later, winner)
            if MODE == "max":
                pooled = tl.maximum(pooled, values, propagate_nan=tl.PropagateNan.ALL)
            else:
                pooled += values
        if MODE != "max":
            divisor = tl.maximum(weights if MODE == "weightedmean" else count, 1).to(tl.float32)
            pooled = tl.div_rn(pooled, tl.sqrt_rn(divisor) if MODE == "mean_sqrt_len" else divisor)

    if states is not None:
        width = _pick(widths, exit)
        tl.store(_pick(states, exit) + row * width + columns, pooled, mask=columns < width)
    if winners is not None:
        width = _pick(widths, exit)
        winner = tl.where(winner == NO_TOKEN, -1, winner)
        tl.store(_pick(winners, exit) + row * width + columns, winner, mask=columns < width)

    for k in tl.static_range(len(outputs)):
        dim = _pick(dims[k], exit)
        inside = columns < dim
        if OUTPUT == "bits":
            byte = tl.arange(0, BLOCK_DIM // 8)
            signs = tl.reshape((inside & (pooled > 0)).to(tl.int32), (BLOCK_DIM // 8, 8))
            packed = tl.sum(signs << (7 - tl.arange(0, 8))[None, :], axis=1)
            size = (dim + 7) // 8
            tl.store(_pick(outputs[k], exit) + row * size + byte, packed.to(tl.uint8), mask=byte < size)
        else:
            prefix = pooled
            if OUTPUT == "int8":
                magnitude = tl.where(inside, tl.abs(pooled), 0.0)
                largest = tl.max(magnitude, axis=0)
                finite = tl.min((magnitude < float("inf")).to(tl.int32), axis=0) > 0
                usable = finite & (largest > 0)
                scaled = tl.div_rn(tl.where(usable, pooled, 0.0), tl.where(usable, largest, 1.0)) * 127.0
                # Adding and taking off 1.5 * 2^23 rounds to an integer, ties to even.
                prefix = (scaled + 12582912.0) - 12582912.0
            elif NORMALIZE:
                norm = tl.sqrt_rn(tl.sum(tl.where(inside, pooled * pooled, 0.0), axis=0))
                prefix = tl.div_rn(pooled, tl.where(norm < EPS, EPS, norm))  # a NaN norm stays NaN
            output = _pick(outputs[k], exit) + row * dim + columns
            tl.store(output, prefix.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _is_larger(a, b):
    """Whether a is larger than b, NaN being the largest of all."""
    return (a > b) | ((a != a) & (b == b))


@triton.jit
def _pick(values, index):
    """values[index], where only the kernel knows the index: pointers and sizes of one exit among those launched."""
    picked = values[0]
    for i in tl.static_range(1, len(values)):
        picked = tl.where(index == i, values[i], picked)
    return picked


@triton.jit
def _sequence(cu_seqlens, row, tokens):
    """First token (in its row, if padded) and number of tokens of a sequence, padding included. int64."""
    tokens = tl.cast(tokens, tl.int64)
    if cu_seqlens is None:
        start = tokens * 0
        end = tokens
    else:
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens + row).to(tl.int64), 0), tokens)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + row + 1).to(tl.int64), start), tokens)
    return start, end - start


@triton.jit
def _piece_length(length):
    """Tokens per piece of a sequence of this length: at most MAX_PIECES pieces of whole blocks."""
    blocks = tl.cdiv(length, MAX_PIECES * BLOCK_TOKENS)
    return tl.maximum(blocks * BLOCK_TOKENS, MIN_PIECE)


@triton.jit
def _valid_tokens(mask_row, stride, length):
    """First and last valid token, their count, and the sum of t - first + 1 over the valid t. int64."""
    if mask_row is None:
        first = length * 0
        last = length - 1
        count = length
        positions = length * (length - 1) // 2
    else:
        first = length
        last = length * 0 - 1
        count = length * 0
        positions = length * 0
        for block in range(0, length, BLOCK_MASK):
            token = block + tl.arange(0, BLOCK_MASK).to(tl.int64)
            valid = tl.load(mask_row + token * stride, mask=token < length, other=0) != 0
            first = tl.minimum(first, tl.min(tl.where(valid, token, length), axis=0))
            last = tl.maximum(last, tl.max(tl.where(valid, token, -1), axis=0))
            count += tl.sum(valid.to(tl.int64), axis=0)
            positions += tl.sum(tl.where(valid, token, 0), axis=0)
    return first, last, count, positions + count * (1 - first)
