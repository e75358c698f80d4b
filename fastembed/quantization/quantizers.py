"""The quantisers by name, behind one signature."""

from collections.abc import Callable

import torch
from torch import Tensor

from .gptq import InverseHessian, quantize_gptq
from .hqq import quantize_hqq
from .mse import quantize_mse
from .rtn import quantize_rtn

Hessian = Tensor | InverseHessian
Quantized = tuple[Tensor, Tensor, Tensor | None]  # codes, scales, zeros as `QuantLinear.from_codes` takes them


def _rtn(
    weight: Tensor, bits: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype, hessian: Hessian | None
) -> Quantized:
    return quantize_rtn(weight, bits, group_size, symmetric, scale_dtype)


def _mse(
    weight: Tensor, bits: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype, hessian: Hessian | None
) -> Quantized:
    return quantize_mse(weight, bits, group_size, symmetric, scale_dtype)


def _hqq(
    weight: Tensor, bits: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype, hessian: Hessian | None
) -> Quantized:
    return quantize_hqq(weight, bits, group_size, scale_dtype)


def _gptq(
    weight: Tensor, bits: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype, hessian: Hessian | None
) -> Quantized:
    assert hessian is not None
    return quantize_gptq(weight, bits, group_size, symmetric, scale_dtype, hessian=hessian)


Quantizer = Callable[[Tensor, int, int, bool, torch.dtype, Hessian | None], Quantized]
QUANTIZERS: dict[str, Quantizer] = {"rtn": _rtn, "mse": _mse, "hqq": _hqq, "gptq": _gptq}
