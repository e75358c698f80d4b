"""GPTQ: rounding one input feature after the other, each time moving the error into those not rounded yet.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (ICLR 2023): the
optimal update of the weights that are still free follows from the inverse of the layer's Hessian, X^T X of its inputs,
through its Cholesky factor, and is applied lazily in blocks. Features go in the order of falling diagonal of the
Hessian ("activation order"), with every group's scale fixed beforehand, so that the codes are stored in the
layer's own order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.qmatmul import whole_row
from ..reference.qmatmul import midpoint
from .mse import quantize_mse

_BLOCK = 128
_DAMPING = 0.01


@dataclass(frozen=True)
class InverseHessian:
    """What GPTQ needs to know of a layer's inputs; made once, it serves any number of bit-levels and rows.

    Attributes:
        order: input features, the most active first.
        factor: the upper Cholesky factor of the inverse of the damped Hessian, in this order.
    """

    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, hessian: Tensor) -> "InverseHessian":
        """Of the sum (or any multiple) of x x^T over inputs x, [in_features, in_features].

        Raises:
            ValueError: it is not square, not finite, or not positive semi-definite.
        """
        if hessian.dim() != 2 or len(hessian) != hessian.shape[1]:
            raise ValueError(f"hessian must be a square matrix, got shape {list(hessian.shape)}")
        if not bool(hessian.isfinite().all()):
            raise ValueError("hessian must be finite, got NaN or infinite entries: the calibration inputs are not")
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        return cls(order, _inverse_factor(hessian[order][:, order].float()))


def quantize_gptq(
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    *,
    hessian: Tensor | InverseHessian,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantise a weight matrix so that its products with the calibration inputs change least.

    Args:
        weight, bits, group_size, symmetric, scale_dtype: as `quantize_rtn`. `quantize_mse` fixes scales and zeros.
        hessian: float32 [in_features, in_features], the sum (or any multiple) of x x^T over calibration inputs x; or
            what `InverseHessian.of` makes of it.

    Returns:
        As `quantize_rtn`.

    Raises:
        ValueError: as `quantize_rtn`; or the Hessian is of another size, not finite, or not positive semi-definite.
    """
    _, scales, zeros = quantize_mse(weight, bits, group_size, symmetric, scale_dtype)
    rows, columns = weight.shape
    inverse = hessian if isinstance(hessian, InverseHessian) else InverseHessian.of(hessian)
    order, factor = inverse.order, inverse.factor
    if len(order) != columns:
        raise ValueError(f"hessian must have shape {[columns, columns]}, got {2 * [len(order)]}")
    size = whole_row(columns) if group_size == -1 else group_size
    top = (1 << bits) - 1
    # Features are rows here: each is read and written as a whole.
    free = weight.detach().float().T[order].contiguous()
    steps = torch.where(scales == 0, 1.0, scales.float()).T.contiguous()
    points = torch.full_like(steps, midpoint(bits)) if zeros is None else zeros.float().T.contiguous()
    group_of = (order // size).tolist()
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        block, corner = free[start:end], factor[start:end, start:end]
        pivots = corner.diagonal().tolist()
        errors = torch.empty_like(block)
        for index in range(end - start):
            step, point = steps[group_of[start + index]], points[group_of[start + index]]
            code = (block[index] / step).add_(point).round_().clamp_(0, top)
            codes[start + index] = code
            rounded = code.sub_(point).mul_(step)
            torch.sub(block[index], rounded, out=errors[index]).div_(pivots[index])
            block[index + 1 :].addr_(corner[index, index + 1 :], errors[index], alpha=-1)
        free[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    unordered = torch.empty_like(codes)
    unordered[order] = codes
    return unordered.T.contiguous(), scales, zeros


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the Hessian, damped as far as it takes."""
    diagonal = hessian.diagonal()
    # A feature that is always zero: any damping leaves it to itself.
    mean = diagonal.mean().item() or 1.0
    damping = _DAMPING
    while damping <= 1:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
        damping *= 10
    raise ValueError("hessian must be positive semi-definite, got one that no damping makes so")
