"""Quantisers: from a float weight to codes, scales and zero points."""

from .rtn import quantize_rtn

__all__ = ["quantize_rtn"]
