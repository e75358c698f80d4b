"""auto-round-lib's linear layer on weights of 2 to 8 bits (Intel's BesTLA kernels), where the wheel is installed.

It takes all cores at its first use, has no way to be told otherwise, and computes parts of its outputs only when OpenMP
gives it fewer later: it can be measured on all cores alone.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastembed.quantization import quantize_rtn

from .. import optional_import

library = optional_import("auto_round_kernel")


def takes(threads: int) -> bool:
    return library is not None and threads == os.cpu_count()


def linear(layer: nn.Linear, x: Tensor, bits: int, group_size: int) -> Callable[[], Tensor]:
    """The layer on x [rows, in_features], its weight rounded to groups with zero points, in int8 arithmetic."""
    codes, scales, zeros = quantize_rtn(layer.weight, bits, group_size, symmetric=False, scale_dtype=torch.float32)
    assert zeros is not None
    # Input features first, codes and zero points as signed bytes.
    centred = [(tensor.short() - 2 ** (bits - 1)).to(torch.int8).T.contiguous() for tensor in (codes, zeros)]
    settings = (group_size, "int8", f"int{bits}", "fp32", True)
    packed = library.repack_quantized_weight(centred[0], scales.T.contiguous(), centred[1], *settings)
    n, k = layer.weight.shape
    y = torch.zeros(x.shape[0], n)  # it multiplies what was there by zero, and NaN stays NaN

    def call() -> Tensor:
        library.woqgemm(x, packed, layer.bias, n, k, *settings, out=y)
        return y

    return call
