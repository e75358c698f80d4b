"""Round-to-nearest within the range that errs least: a group's extremes are drawn in while its squared error falls.

With few bits, steps that reach the extremes are too coarse for all other weights, and a group is better off with a few
of them cut short. The range is found by search, as in Frantar et al.'s GPTQ code and in Choukroun et al., "Low-bit
Quantization of Neural Networks for Efficient Inference" (2019). Zero stays exactly representable: input features with
large activations tend to have small weights, and what those err by counts most.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.qmatmul import whole_row
from ..reference.qmatmul import zero_points
from .rtn import check_finite, even_steps, quantize_rtn

# Shares of a group's range that are tried, and up to how many bits: beyond, steps are fine enough as they are.
_SHARES = tuple(1 - 0.04 * step for step in range(13))
_MOST_BITS = 6
# Weights that are worked on together, so that all passes over them stay in the caches.
_PIECE = 1 << 17


def quantize_mse(
    weight: Tensor, bits: int, group_size: int, symmetric: bool = False, scale_dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantise a weight matrix with the least squared error per group; arguments, result and errors as `quantize_rtn`.

    One bit, whose two values are the best already, and more than six are as `quantize_rtn` has them.
    """
    if not 1 < bits <= _MOST_BITS or not weight.numel():
        return quantize_rtn(weight, bits, group_size, symmetric, scale_dtype)
    check_finite(weight)
    rows, columns = weight.shape
    if group_size == -1:
        group_size = whole_row(columns)
    step = max(1, _PIECE // columns)
    pieces = []
    for row in range(0, rows, step):
        padded = F.pad(weight[row : row + step].float(), (0, -columns % group_size))
        pieces.append(_search(padded.unflatten(1, (-1, group_size)), bits, symmetric, scale_dtype))
    codes, scales, zeros = zip(*pieces, strict=True)
    return torch.cat(codes).flatten(1)[:, :columns], torch.cat(scales), None if symmetric else torch.cat(zeros)


def _search(
    groups: Tensor, bits: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
    best = torch.ones_like(low)
    least = torch.full_like(low, float("inf"))
    for share in _SHARES:
        codes, scales, zeros = even_steps(groups, share * low, share * high, bits, symmetric, scale_dtype)
        codes.sub_(zero_points(scales, zeros, bits)[..., None]).mul_(scales.float()[..., None]).sub_(groups)
        error = codes.square_().sum(dim=2)
        better = error < least
        best, least = torch.where(better, share, best), torch.where(better, error, least)
    codes, scales, zeros = even_steps(groups, best * low, best * high, bits, symmetric, scale_dtype)
    return codes.to(torch.uint8), scales, zeros
