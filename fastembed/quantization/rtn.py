"""Round-to-nearest: every weight to the nearest of 2**bits evenly spaced values between its group's extremes.

No data and no optimisation, so it costs one pass over the weight. Method: the affine and symmetric schemes of Jacob et
al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference" (2018), per group of
input features. One bit has no room for that: its two values are the means of the weights on either side of a threshold,
as in Rastegari et al., "XNOR-Net" (2016), which errs least for that threshold.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.qmatmul import whole_row
from ..reference.qmatmul import midpoint, zero_points


def quantize_rtn(
    weight: Tensor, bits: int, group_size: int, symmetric: bool = False, scale_dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantise a weight matrix in groups of input features.

    Args:
        weight: [out_features, in_features], floating point, finite.
        bits: 1 to 8; codes are 0 .. 2**bits - 1.
        group_size: input features that share a scale; the last group may be shorter. -1: all of them.
        symmetric: zero is the middle code, 2**(bits - 1), and no zero points are kept; one bit stands for -s / 2 and
            s / 2. Otherwise a group's codes span its smallest to its largest weight (zero included, and represented
            exactly); one bit stands for any two values.
        scale_dtype: float16, bfloat16 or float32.

    Returns:
        codes uint8 [out_features, in_features], scales [out_features, groups] and zero points of the same shape, uint8
        (for one bit fractional, in scale_dtype; None when symmetric), so that weight ~ scales * (codes - zeros).

    Raises:
        ValueError: the weight has NaN or infinite entries, or a group's step is too large for scale_dtype.
    """
    check_finite(weight)
    rows, columns = weight.shape
    if group_size == -1:
        group_size = whole_row(columns)
    count = -(-columns // group_size)
    padding = (0, -columns % group_size)
    groups = F.pad(weight.float(), padding).reshape(rows, count, group_size)
    if bits == 1:
        inside = F.pad(torch.ones_like(weight, dtype=torch.bool), padding).reshape(rows, count, group_size)
        codes, scales, zeros = _two_values(groups, inside, symmetric, scale_dtype)
    else:
        # Padding with zeros changes no extreme, because the range always includes zero.
        low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
        codes, scales, zeros = even_steps(groups, low, high, bits, symmetric, scale_dtype)
    return codes.to(torch.uint8).flatten(1)[:, :columns], scales, zeros


def even_steps(
    groups: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Groups [rows, groups, size] on 2**bits even steps from low to high [rows, groups], as `quantize_rtn` has them.

    The codes are still of the groups' dtype.
    """
    top = (1 << bits) - 1
    spread = torch.maximum(-low, high) / (top // 2) if symmetric else (high - low) / top
    scales = stored_scales(spread, scale_dtype)
    # Codes are found with the scale as stored. A group of zeros has scale 0 and any code will do.
    steps = torch.where(scales > 0, scales.float(), 1.0)
    zeros = torch.full_like(low, midpoint(bits)) if symmetric else (-low / steps).round().clamp(0, top)
    codes = (groups / steps[..., None] + zeros[..., None]).round().clamp(0, top)
    return codes, scales, None if symmetric else zeros.to(torch.uint8)


def _two_values(
    groups: Tensor, inside: Tensor, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    if symmetric:
        scales = stored_scales(2 * _mean(groups.abs(), inside), scale_dtype)
        return groups > 0, scales, None
    above = (groups > _mean(groups, inside)[..., None]) & inside
    low, high = _mean(groups, inside & ~above), _mean(groups, above)
    high = torch.where(above.any(dim=2), high, low)
    # Where all weights are one value v, that is scale v times one step up from zero.
    flat = high == low
    scales = stored_scales(torch.where(flat, low, high - low), scale_dtype)
    steps = torch.where(scales == 0, 1.0, scales.float())
    zeros = torch.where(flat, -1.0, -low / steps).to(scale_dtype)
    return above, scales, zeros


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, values, 0).sum(dim=2) / where.sum(dim=2).clamp(min=1)


def stands_for(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int) -> Tensor:
    """The float32 weight [out_features, in_features] of what a quantiser returns."""
    rows, columns = codes.shape
    if group_size == -1:
        group_size = whole_row(columns)
    groups = F.pad(codes, (0, -columns % group_size)).reshape(rows, -1, group_size).float()
    groups.sub_(zero_points(scales, zeros, bits)[..., None]).mul_(scales.float()[..., None])
    return groups.flatten(1)[:, :columns]


def check_finite(weight: Tensor, name: str = "weight") -> None:
    """Raise ValueError for a weight with NaN or infinite entries."""
    # A finite sum takes one pass and no temporaries; only one that is not needs a closer look.
    if not bool(weight.sum().isfinite()) and not bool(weight.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinite entries")


def stored_scales(steps: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in the dtype that keeps them; ValueError where it cannot."""
    scales = steps.to(dtype)
    if not bool(scales.isfinite().all()):
        raise ValueError(f"weight is too large: a step of {steps.abs().max().item():.3g} does not fit in {dtype}")
    return scales
