"""fastembed: fast kernels for text-embedding models, on CPU, CUDA and Triton, behind one thin API."""

from ._distributions import warn_if_name_is_shared as _warn_if_name_is_shared
from ._native import torch as _torch
from .backends import use_backend
from .info import info
from .ops.search import SDCCodes, hamming_topk, pack_bits, rescore, sdc_encode, sdc_topk

__version__ = "0.1.0"

if _torch is not None:
    from .ops.pooling import pool_exits

_warn_if_name_is_shared()

__all__ = [
    "SDCCodes",
    "hamming_topk",
    "info",
    "pack_bits",
    "pool_exits",
    "rescore",
    "sdc_encode",
    "sdc_topk",
    "use_backend",
]
