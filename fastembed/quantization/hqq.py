"""Half-quadratic quantisation: zero points that fit a group's weights under a norm that forgives outliers.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023). The error of a weight is split
into a sparse part, found by soft thresholding for the l_p norm with p < 1, and the rest, which the zero point minimises
in closed form; the two take turns. No data is needed.

Two things differ from the authors' code. Zero points are rounded to codes in every turn, which they do at 4 bits only,
so that a weight of zero stays zero; and as whole zero points leave little to find, scales are fitted with them. In
encoders the input features with the largest activations have small weights, and half a step of error in those moves the
embeddings more than all that fractional zero points gain elsewhere.
"""

import torch
from torch import Tensor

from ..ops.qmatmul import whole_row
from .rtn import check_finite, quantize_rtn, stored_scales

_ITERATIONS = 20
_NORM = 0.7
_BETA = 10.0  # weight of the quadratic part against the norm, and what it grows by
_GROWTH = 1.01
# Weights that are worked on together, so that all passes over them stay in the caches.
_PIECE = 1 << 17


def quantize_hqq(
    weight: Tensor, bits: int, group_size: int, scale_dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise a weight matrix in groups of input features; arguments and errors as `quantize_rtn`.

    Returns:
        codes uint8 [out_features, in_features], scales [out_features, groups] in scale_dtype and zero points of the
        same shape, uint8 (for one bit fractional, in scale_dtype).
    """
    check_finite(weight)
    rows, columns = weight.shape
    if group_size == -1:
        group_size = whole_row(columns)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, -(-columns // group_size), dtype=scale_dtype, device=weight.device)
    zeros = torch.empty_like(scales, dtype=scale_dtype if bits == 1 else torch.uint8)
    whole = columns // group_size * group_size
    parts = [(0, whole, group_size), (whole, columns, columns - whole)]  # the last group may be shorter
    for start, end, size in parts:
        if start == end:
            continue
        first, last = start // group_size, -(-end // group_size)
        step = max(1, _PIECE // (end - start))
        for row in range(0, rows, step):
            piece = weight[row : row + step, start:end].float()
            q, s, z = _quantize_piece(piece.unflatten(1, (-1, size)), bits, scale_dtype)
            codes[row : row + step, start:end] = q.flatten(1)
            scales[row : row + step, first:last], zeros[row : row + step, first:last] = s, z
    return codes, scales, zeros


def _quantize_piece(groups: Tensor, bits: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    top = (1 << bits) - 1
    low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
    if bits == 1:  # two values at the extremes would fit nothing between them
        rows, count, size = groups.shape
        _, scales, start = quantize_rtn(groups.reshape(rows * count, size), 1, -1, scale_dtype=scale_dtype)
        scales = scales.reshape(rows, count)
        assert start is not None
        zeros = start.reshape(rows, count).float()
    else:
        scales = stored_scales((high - low) / top, scale_dtype)
        zeros = -low / _steps(scales)
    best_scales, best_zeros = scales, zeros
    least = torch.full_like(zeros, float("inf"))
    beta = _BETA
    for _ in range(_ITERATIONS):
        zeros = zeros.to(scale_dtype).float() if bits == 1 else zeros.round().clamp(0, top)
        steps = _steps(scales)
        codes = _codes(groups, steps, zeros, top)
        values = codes - zeros[..., None]
        errors = groups - values * steps[..., None]
        magnitudes = errors.abs()
        loss = magnitudes.mean(dim=2)
        better = loss < least
        if not bool(better.any()):
            break
        best_scales, best_zeros = torch.where(better, scales, best_scales), torch.where(better, zeros, best_zeros)
        least = torch.where(better, loss, least)
        # What exceeds the threshold is the outliers' own; scale and zero point are to answer for the rest.
        sparse = (magnitudes - (magnitudes + 1e-8).pow_(_NORM - 1).div_(beta)).clamp_(min=0).copysign_(errors)
        rest = groups - sparse
        squares = values.square().sum(dim=2)
        fitted = (rest * values).sum(dim=2) / squares
        scales = stored_scales(torch.where((squares > 0) & (fitted > 0), fitted, scales.float()), scale_dtype)
        zeros = codes.sub_(rest.div_(_steps(scales)[..., None])).mean(dim=2)
        beta *= _GROWTH
    codes = _codes(groups, _steps(best_scales), best_zeros, top)
    return codes.to(torch.uint8), best_scales, best_zeros.to(scale_dtype if bits == 1 else torch.uint8)


def _codes(groups: Tensor, steps: Tensor, zeros: Tensor, top: int) -> Tensor:
    return (groups / steps[..., None]).add_(zeros[..., None]).round_().clamp_(0, top)


def _steps(scales: Tensor) -> Tensor:
    """Scales to divide by. A group of zeros has scale 0, and any code will do."""
    return torch.where(scales == 0, 1.0, scales.float())
