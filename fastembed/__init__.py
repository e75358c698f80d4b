"""fastembed: fast kernels for text-embedding models, on CPU, CUDA and Triton, behind one thin API."""

from typing import NoReturn

from ._distributions import warn_if_name_is_shared as _warn_if_name_is_shared
from ._native import torch as _torch
from .backends import use_backend
from .index import BinaryIndex, IndexFileError, IVFBinaryIndex
from .info import info
from .ops.fde import FDEMatrices, fde_documents, fde_queries
from .ops.relative import relative_representations
from .ops.scalar_codes import ScalarCodes, ScalarQuantizer, scalar_topk
from .ops.search import (
    SDCCodes,
    hamming_range,
    hamming_topk,
    pack_bits,
    rescore,
    sdc_encode,
    sdc_topk,
    unpack_bits,
)

__version__ = "0.1.0"

__all__ = [
    "BinaryIndex",
    "FDEMatrices",
    "IVFBinaryIndex",
    "IndexFileError",
    "MultiExitEncoder",
    "QuantConfig",
    "SDCCodes",
    "ScalarCodes",
    "ScalarQuantizer",
    "SwapReport",
    "dense_exits",
    "fde_documents",
    "fde_queries",
    "hamming_range",
    "hamming_topk",
    "info",
    "load_quantized",
    "nn",
    "pack_bits",
    "pool_exits",
    "prepend_token",
    "quantize",
    "relative_representations",
    "rescore",
    "save_quantized",
    "scalar_topk",
    "sdc_encode",
    "sdc_topk",
    "swap",
    "train_binarizer",
    "unpack_bits",
    "unswap",
    "use_backend",
]

if _torch is not None:
    from . import nn
    from .checkpoint import load_quantized, save_quantized
    from .dense import dense_exits
    from .encoder import MultiExitEncoder
    from .ops.pooling import pool_exits
    from .prepend import prepend_token
    from .quantization import QuantConfig
    from .report import SwapReport
    from .swap import quantize, swap, unswap
    from .training import train_binarizer

_warn_if_name_is_shared()


def __getattr__(name: str) -> NoReturn:
    """Reached for names that are not there: mistyped ones, and, without PyTorch, those that need it."""
    if name in __all__:
        raise ImportError(f"fastembed.{name} needs PyTorch: pip install 'fastembed-kernels[torch]'")
    raise AttributeError(f"module 'fastembed' has no attribute {name!r}")
