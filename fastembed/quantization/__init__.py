"""Quantisers, from a float weight to codes, scales and zero points, and which layer gets how many bits."""

from .config import QuantConfig
from .gptq import quantize_gptq
from .hqq import quantize_hqq
from .mse import quantize_mse
from .rtn import quantize_rtn

__all__ = ["QuantConfig", "quantize_gptq", "quantize_hqq", "quantize_mse", "quantize_rtn"]
