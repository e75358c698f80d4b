"""ggml's quantised matrix product, by ctypes, from the `xllamacpp` wheel (which carries ggml and exports its C API)."""

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# ggml.h's numbers. Kinds of a bit-width in the order in which they are tried: those of 256 weights to a block need
# in_features that blocks divide.
KINDS = {
    2: ("Q2_K",),
    3: ("Q3_K",),
    4: ("Q4_K", "Q4_0"),
    5: ("Q5_K", "Q5_0"),
    6: ("Q6_K",),
    8: ("Q8_0",),
}
_TYPES = {
    "Q4_0": 2,
    "Q5_0": 6,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
}
_BLOCKS = {"Q4_0": 32, "Q5_0": 32, "Q8_0": 32}
_F32 = 0
# Kinds that ggml has interleaved kernels for on x86.
_REPACKED = ("Q4_0", "Q4_K")
_REPACK_BUFFER_TYPE = "_Z35ggml_backend_cpu_repack_buffer_typev"
_GRAPH_BYTES = 1 << 20

_pointer, _size, _int, _int64 = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int64,
)


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", _size),
        ("mem_buffer", _pointer),
        ("no_alloc", ctypes.c_bool),
    )


_FUNCTIONS = {
    "ggml_init": (_pointer, _InitParams),
    "ggml_new_tensor_2d": (_pointer, _pointer, _int, _int64, _int64),
    "ggml_mul_mat": (_pointer, _pointer, _pointer, _pointer),
    "ggml_new_graph": (_pointer, _pointer),
    "ggml_build_forward_expand": (None, _pointer, _pointer),
    "ggml_backend_cpu_init": (_pointer,),
    "ggml_backend_cpu_set_n_threads": (None, _pointer, _int),
    "ggml_backend_cpu_buffer_type": (_pointer,),
    _REPACK_BUFFER_TYPE: (_pointer,),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_pointer, _pointer, _pointer),
    "ggml_backend_graph_compute": (_int, _pointer, _pointer),
    "ggml_backend_tensor_set": (None, _pointer, _pointer, _size, _size),
    "ggml_backend_tensor_get": (None, _pointer, _pointer, _size, _size),
    "ggml_quantize_chunk": (
        _size,
        _int,
        _pointer,
        _pointer,
        _int64,
        _int64,
        _int64,
        _pointer,
    ),
    "ggml_row_size": (_size, _int, _int64),
}


def kind_for(bits: int, in_features: int) -> str | None:
    """ggml's kind of about so many bits that takes rows of this length, if it has one and the library is there."""
    if _library() is None:
        return None
    return next(
        (kind for kind in KINDS.get(bits, ()) if in_features % _BLOCKS.get(kind, 256) == 0),
        None,
    )


def linear(weight: Tensor, x: Tensor, kind: str, threads: int) -> Callable[[], Tensor]:
    """x [rows, in_features] times weight [out_features, in_features], quantised to `kind`: [rows, out_features]."""
    lib = _library()
    assert lib is not None
    (out_features, in_features), rows = weight.shape, x.shape[0]
    weights, products = (lib.ggml_init(_InitParams(_GRAPH_BYTES, None, True)) for _ in range(2))
    w = lib.ggml_new_tensor_2d(weights, _TYPES[kind], in_features, out_features)
    inputs = lib.ggml_new_tensor_2d(products, _F32, in_features, rows)
    outputs = lib.ggml_mul_mat(products, w, inputs)
    cpu = lib.ggml_backend_cpu_buffer_type()
    repacked = getattr(lib, _REPACK_BUFFER_TYPE)() if kind in _REPACKED else cpu
    lib.ggml_backend_alloc_ctx_tensors_from_buft(weights, repacked)
    lib.ggml_backend_alloc_ctx_tensors_from_buft(products, cpu)
    codes = np.empty(lib.ggml_row_size(_TYPES[kind], in_features) * out_features, np.uint8)
    weight = weight.float().contiguous()
    lib.ggml_quantize_chunk(
        _TYPES[kind],
        weight.data_ptr(),
        codes.ctypes.data,
        0,
        out_features,
        in_features,
        None,
    )
    lib.ggml_backend_tensor_set(w, codes.ctypes.data, 0, codes.nbytes)
    lib.ggml_backend_tensor_set(inputs, x.data_ptr(), 0, x.numel() * 4)
    graph = lib.ggml_new_graph(products)
    lib.ggml_build_forward_expand(graph, outputs)
    backend = lib.ggml_backend_cpu_init()
    lib.ggml_backend_cpu_set_n_threads(backend, threads)
    y = torch.empty(rows, out_features)

    def call() -> Tensor:
        lib.ggml_backend_graph_compute(backend, graph)
        lib.ggml_backend_tensor_get(outputs, y.data_ptr(), 0, y.numel() * 4)
        return y

    return call


@cache
def _library() -> ctypes.CDLL | None:
    """The wheel's extension module, as the plain shared library that it also is."""
    package = PathFinder.find_spec("xllamacpp")
    if package is None or package.origin is None:
        return None
    lib = ctypes.CDLL(str(next(Path(package.origin).parent.glob("*.so"))))
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(lib, name, None)
        if function is None:
            return None
        function.restype, function.argtypes = result, arguments
    return lib
