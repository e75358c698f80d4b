"""Round-to-nearest: every weight to the nearest of 2**bits evenly spaced values between its group's extremes.

No data and no optimisation, so it costs one pass over the weight. Method: the affine and symmetric schemes of Jacob et
al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference" (2018), per group of
input features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.qmatmul import midpoint

SCALE_DTYPE = torch.float16


def quantize_rtn(
    weight: Tensor, bits: int, group_size: int, symmetric: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantise a weight matrix in groups of input features.

    Args:
        weight: [out_features, in_features], floating point, finite.
        bits: 1 to 8; codes are 0 .. 2**bits - 1.
        group_size: input features that share a scale; the last group may be shorter.
        symmetric: zero is the middle code, 2**(bits - 1), and no zero points are kept; one bit stands for plus or minus
            the group's largest magnitude. Otherwise a group's codes span its smallest to its largest weight (zero
            included, and represented exactly).

    Returns:
        codes uint8 [out_features, in_features], scales float16 [out_features, groups] and zero points uint8 of the
        same shape (None when symmetric), so that weight ~ scales * (codes - zeros).

    Raises:
        ValueError: the weight has NaN or infinite entries, or a group's step is too large for float16.
    """
    if not bool(weight.isfinite().all()):
        raise ValueError("weight must be finite, got NaN or infinite entries")
    rows, columns = weight.shape
    count = -(-columns // group_size)
    top = (1 << bits) - 1
    # Padding with zeros changes no extreme, because the range always includes zero.
    groups = F.pad(weight.float(), (0, -columns % group_size)).reshape(rows, count, group_size)
    low = groups.amin(dim=2).clamp(max=0)
    high = groups.amax(dim=2).clamp(min=0)
    spread = torch.maximum(-low, high) / max(top // 2, 0.5) if symmetric else (high - low) / top
    scales = spread.to(SCALE_DTYPE)
    if not bool(scales.isfinite().all()):
        raise ValueError(f"weight is too large: a step of {spread.max().item():.3g} does not fit in {SCALE_DTYPE}")
    # Codes are found with the scale as stored. A group of zeros has scale 0 and any code will do.
    steps = torch.where(scales > 0, scales.float(), 1.0)
    zeros = torch.full_like(low, midpoint(bits)) if symmetric else (-low / steps).round().clamp(0, top)
    codes = (groups / steps[..., None] + zeros[..., None]).round().clamp(0, top)
    codes = codes.to(torch.uint8).flatten(1)[:, :columns]
    return codes, scales, None if symmetric else zeros.to(torch.uint8)
