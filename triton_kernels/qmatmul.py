"""Low-bit linear layers in Triton: activations to int8, products on int8 tensor cores, at any width of 1 to 8 bits.

`quantize_tokens` finds each token's scale and codes; `multiply` unpacks the codes of a panel as they come, multiplies
them by a block of tokens and, where one block has all input features, finishes the outputs; with few tokens the input
features are split over blocks instead, and `join_splits` adds their float32 sums in order. Nothing is added atomically.
Integer sums are exact over at most 128 input features, then scaled and added in float32 in the order of the features.
Sizes of blocks come from a fixed table by the number of tokens, not from tuning at run time: results are the same on
every device.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastembed.reference.qmatmul import PANEL as PANEL_WIDTH
from fastembed.reference.qmatmul import SMALLEST_AMAX as SMALLEST

PANEL = tl.constexpr(PANEL_WIDTH)
SMALLEST_AMAX = tl.constexpr(SMALLEST)
WORDS = tl.constexpr(PANEL_WIDTH // 2)  # of a panel, for four input features
BLOCK_FEATURES = tl.constexpr(1024)  # of a token, quantised at a time
JOINED = tl.constexpr(1024)  # outputs joined by a block

# Blocks that a launch should have, where splitting the input features can bring them.
BLOCKS_WANTED = 264
LONGEST_DOT = 128
SHORTEST_DOT = 32

# Said, because Triton's default for contracting a * b + c into one rounding changes between versions.
COMPILER = {"enable_fp_fusion": True}


class Config(NamedTuple):
    """How `multiply` is cut."""

    most_rows: float
    block_rows: int
    splits: bool
    num_warps: int
    num_stages: int


CONFIGS = (Config(16, 16, True, 4, 3), Config(64, 32, True, 4, 3), Config(float("inf"), 128, False, 8, 3))


def qlinear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    epilogue: str | None,
) -> Tensor:
    """The layer on x [..., in_features]; the contract of `fastembed.reference.qmatmul.qlinear`."""
    in_features = x.shape[-1]
    rows = x.shape[:-1].numel()
    y = x.new_empty(*x.shape[:-1], out_features)
    if y.numel() == 0:
        return y
    x = x.reshape(rows, in_features)
    codes, scales = codes.contiguous(), scales.contiguous()
    zeros, bias, residual = (None if tensor is None else tensor.contiguous() for tensor in (zeros, bias, residual))
    features = triton.cdiv(in_features, LONGEST_DOT) * LONGEST_DOT
    config = next(config for config in CONFIGS if rows <= config.most_rows)
    dot = _dot_features(group_size)
    pieces = triton.cdiv(min(group_size, in_features), dot)
    panels = triton.cdiv(out_features, PANEL_WIDTH)
    row_blocks = triton.cdiv(rows, config.block_rows)
    with torch.cuda.device_of(x):
        tokens = x.new_empty(rows, features, dtype=torch.int8)
        token_scales = x.new_empty(rows, dtype=torch.float32)
        quantize_tokens[(rows,)](
            x, tokens, token_scales, in_features, features, x.stride(0), x.stride(1), num_warps=4, **COMPILER
        )
        count = scales.shape[1] * pieces
        splits = min(triton.cdiv(BLOCKS_WANTED, panels * row_blocks), max(1, count // 4)) if config.splits else 1
        partials = x.new_empty(splits, rows, panels * PANEL_WIDTH, dtype=torch.float32) if splits > 1 else None
        finish = (token_scales, bias, residual, y, rows, out_features)
        multiply[panels, row_blocks, splits](
            tokens,
            codes,
            scales,
            zeros,
            partials,
            *finish,
            in_features,
            features,
            scales.shape[1],
            group_size,
            pieces,
            count,
            codes.shape[1],
            BITS=bits,
            EPILOGUE=epilogue,
            BLOCK_ROWS=config.block_rows,
            DOT=dot,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **COMPILER,
        )
        if partials is not None:
            grid = (triton.cdiv(rows * panels * PANEL_WIDTH, JOINED.value),)
            join_splits[grid](
                partials, *finish, panels * PANEL_WIDTH, splits, EPILOGUE=epilogue, num_warps=4, **COMPILER
            )
    return y


def _dot_features(group_size: int) -> int:
    """Input features of one integer product: a power of two that divides the group, or the least the hardware takes."""
    dot = LONGEST_DOT
    while group_size % dot and dot > SHORTEST_DOT:
        dot //= 2
    return dot


@triton.jit
def quantize_tokens(x, tokens, token_scales, in_features, features, row_stride, feature_stride):
    """tokens[m] = round(x[m] * (127 / amax)) as int8, token_scales[m] = amax / 127, amax the largest |x[m]|; zeros and
    NaN for a token with a NaN or infinity. x: [rows, in_features]; tokens: [rows, features], filled up with zeros.
    Grid: (rows,).
    """
    row = tl.program_id(0).to(tl.int64)
    source = x + row * row_stride
    # The bits of magnitudes are ordered as the magnitudes are, infinity and NaN last.
    largest = tl.zeros((BLOCK_FEATURES,), tl.int32)
    for block in range(0, in_features, BLOCK_FEATURES):
        feature = block + tl.arange(0, BLOCK_FEATURES).to(tl.int64)
        values = tl.load(source + feature * feature_stride, mask=feature < in_features, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    bits = tl.max(largest, axis=0)
    finite = bits < 0x7F800000
    amax = tl.maximum(bits.to(tl.float32, bitcast=True), SMALLEST_AMAX)
    inverse = tl.div_rn(127.0, amax)
    tl.store(token_scales + row, tl.where(finite, amax * (1.0 / 127.0), float("nan")))
    for block in range(0, features, BLOCK_FEATURES):
        feature = block + tl.arange(0, BLOCK_FEATURES).to(tl.int64)
        wanted = finite & (feature < in_features)
        values = tl.load(source + feature * feature_stride, mask=wanted, other=0.0).to(tl.float32)
        # Adding and taking off 1.5 * 2^23 rounds to an integer, ties to even.
        rounded = (tl.where(wanted, values, 0.0) * inverse + 12582912.0) - 12582912.0
        tl.store(tokens + row * features + feature, rounded.to(tl.int8), mask=feature < features)


@triton.jit
def multiply(
    tokens,
    codes,
    scales,
    zeros,
    partials,
    token_scales,
    bias,
    residual,
    y,
    rows,
    out_features,
    in_features,
    features,
    groups,
    group_size,
    pieces,
    count,
    quads,
    BITS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    DOT: tl.constexpr,
):
    """A block of tokens times one panel of 64 output features, over one of the splits of `count` pieces of DOT input
    features, `pieces` of them to a group.

    partials: float32 [splits, rows, panels * 64] for the sums, or None to finish the outputs here.
    Grid: (panels, blocks of rows, splits).
    """
    panel = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, PANEL)
    first = count * tl.program_id(2) // tl.num_programs(2)
    end = count * (tl.program_id(2) + 1) // tl.num_programs(2)
    origin: tl.constexpr = 1 << (BITS - 1)
    midpoint: tl.constexpr = 0.5 if BITS == 1 else origin

    total = tl.zeros((BLOCK_ROWS, PANEL), tl.float32)
    for piece in range(first, end):
        group = piece // pieces
        start = group * group_size + piece % pieces * DOT
        stop = tl.minimum(tl.minimum((group + 1) * group_size, start + DOT), in_features)
        feature = start + tl.arange(0, DOT)
        inside = (row[:, None] < rows) & (feature[None, :] < stop)
        a = tl.load(tokens + row[:, None] * features + feature[None, :], mask=inside, other=0)
        b = _unpacked(codes + panel * quads * 32 * BITS, start // 4, quads, BITS, DOT)
        dot = tl.dot(a, b, out_dtype=tl.int32)
        index = (panel * groups + group) * PANEL + column
        scale = tl.load(scales + index).to(tl.float32)
        # `b` holds the codes less the origin: what is left of the zero point multiplies the sum of the activations.
        token_sum = tl.sum(a.to(tl.int32), axis=1)[:, None]
        if zeros is None:
            if midpoint == origin:
                total += dot.to(tl.float32) * scale[None, :]
            else:
                total += dot.to(tl.float32) * scale[None, :]
                total += token_sum.to(tl.float32) * (scale * (origin - midpoint))[None, :]
        elif zeros.dtype.element_ty == tl.uint8:
            zero = tl.load(zeros + index).to(tl.int32)
            total += (dot + token_sum * (origin - zero)[None, :]).to(tl.float32) * scale[None, :]
        else:
            zero = tl.load(zeros + index).to(tl.float32)
            total += dot.to(tl.float32) * scale[None, :]
            total += token_sum.to(tl.float32) * (scale * (origin - zero))[None, :]

    feature = panel * PANEL + column
    if partials is None:
        wanted = (row[:, None] < rows) & (feature[None, :] < out_features)
        _finish(total, row[:, None], feature[None, :], wanted, token_scales, bias, residual, y, out_features, EPILOGUE)
    else:
        slot = tl.program_id(2).to(tl.int64) * rows + row[:, None]
        tl.store(partials + slot * tl.num_programs(0) * PANEL + feature[None, :], total, mask=row[:, None] < rows)


@triton.jit
def join_splits(
    partials,
    token_scales,
    bias,
    residual,
    y,
    rows,
    out_features,
    width,
    splits,
    EPILOGUE: tl.constexpr,
):
    """Finish the outputs from the splits' sums, partials [splits, rows, width], added in their order. Grid: blocks of
    JOINED outputs."""
    index = tl.program_id(0).to(tl.int64) * JOINED + tl.arange(0, JOINED)
    row = index // width
    feature = index % width
    inside = row < rows
    total = tl.zeros((JOINED,), tl.float32)
    for split in range(0, splits):
        total += tl.load(partials + split * tl.cast(rows, tl.int64) * width + index, mask=inside, other=0.0)
    wanted = inside & (feature < out_features)
    _finish(total, row, feature, wanted, token_scales, bias, residual, y, out_features, EPILOGUE)


@triton.jit
def _unpacked(panel_codes, first_quad, quads, BITS: tl.constexpr, DOT: tl.constexpr):
    """Codes of DOT input features, less 2^(BITS - 1): int8 [DOT, 64]; those past the last quad are any numbers.

    A word of BITS bytes holds eight codes, of two output features by four input features: see
    fastembed/reference/qmatmul.py.
    """
    QUADS: tl.constexpr = DOT // 4
    quad = first_quad + tl.arange(0, QUADS)
    word = panel_codes + quad[:, None] * (32 * BITS) + tl.arange(0, WORDS)[None, :] * BITS
    inside = (quad < quads)[:, None]
    low = tl.zeros((QUADS, WORDS), tl.uint32)  # the codes of the first output feature, 4 * BITS bits
    high = tl.zeros((QUADS, WORDS), tl.uint32)
    for i in tl.static_range(BITS):
        byte = tl.load(word + i, mask=inside, other=0).to(tl.uint32)
        if 8 * i < 4 * BITS:
            low |= byte << (8 * i)
        if 8 * i + 8 > 4 * BITS:
            if 8 * i >= 4 * BITS:
                high |= byte << (8 * i - 4 * BITS)
            else:
                high |= byte >> (4 * BITS - 8 * i)
    shifts = (tl.arange(0, 4) * BITS)[None, None, None, :]
    pairs = tl.join(low, high)  # [QUADS, WORDS, 2]
    fields = (pairs[:, :, :, None] >> shifts) & ((1 << BITS) - 1)
    signed = (fields.to(tl.int32) - (1 << (BITS - 1))).to(tl.int8)
    return tl.reshape(tl.permute(signed, (0, 3, 1, 2)), (DOT, PANEL))


@triton.jit
def _finish(total, row, feature, wanted, token_scales, bias, residual, y, out_features, EPILOGUE: tl.constexpr):
    """y = act(total * token_scales[row] + bias[feature]) + residual"""
    value = total * tl.load(token_scales + row, mask=wanted, other=0.0)
    if bias is not None:
        value += tl.load(bias + feature, mask=wanted, other=0.0).to(tl.float32)
    if EPILOGUE == "gelu":
        value = 0.5 * value * (1.0 + tl.erf(value * 0.70710678))
    elif EPILOGUE == "gelu_tanh":
        # tanh(u) = 1 - 2 / (e^2u + 1), with one sign for both, so that nothing overflows
        u = 0.79788456 * (value + 0.044715 * value * value * value)
        decay = tl.exp(-2.0 * tl.abs(u))
        tanh = tl.div_rn(1.0 - decay, 1.0 + decay)
        value = 0.5 * value * (1.0 + tl.where(u < 0, -tanh, tanh))
    elif EPILOGUE == "relu":
        value = tl.where(value < 0, 0.0, value)  # a NaN stays
    elif EPILOGUE == "silu":
        value = tl.div_rn(value, 1.0 + tl.exp(-value))
    index = row * out_features + feature
    if residual is not None:
        value += tl.load(residual + index, mask=wanted, other=0.0).to(tl.float32)
    tl.store(y + index, value.to(y.dtype.element_ty), mask=wanted)
