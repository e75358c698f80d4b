"""fastembed: fast kernels for text-embedding models, on CPU, CUDA and Triton, behind one thin API."""

from ._native import torch as _torch
from .backends import use_backend

__version__ = "0.1.0"

if _torch is not None:
    from .ops.pooling import pool_exits

__all__ = ["pool_exits", "use_backend"]
