"""Quantisers: from a float weight to codes, scales and zero points; and what to quantise."""

from .config import QuantConfig
from .rtn import quantize_rtn

__all__ = ["QuantConfig", "quantize_rtn"]
