"""ONNX Runtime's linear layers on low-bit weights, each as a model of one node, where the wheels are installed."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from .. import optional_import

onnx = optional_import("onnx")
onnxruntime = optional_import("onnxruntime")


def is_installed() -> bool:
    return onnx is not None and onnxruntime is not None


def dynamic_int8(layer: nn.Linear, x: Tensor, threads: int) -> Callable[[], Tensor]:
    """The layer on x [rows, in_features]: int8 weights per output feature, one activation scale per tensor."""
    return _call(_dynamic_int8_model(layer), x, threads)


def matmul_nbits(layer: nn.Linear, x: Tensor, bits: int, group_size: int, threads: int) -> Callable[[], Tensor]:
    """The layer on x [rows, in_features], its weight in groups of 2, 4 or 8 bits with zero points."""
    return _call(_matmul_nbits_model(layer, bits, group_size), x, threads)


def _call(model: bytes, x: Tensor, threads: int) -> Callable[[], Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # As for the other libraries here: threads that wait for work sleep instead of spinning on the cores of the next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    inputs = {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def _model(linear: nn.Linear, op: str, inputs: dict[str, np.ndarray], **attributes: int) -> bytes:
    helper = onnx.helper
    node = helper.make_node(op, ["x", *inputs], ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        op,
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["rows", linear.in_features])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["rows", linear.out_features])],
        [onnx.numpy_helper.from_array(array, name) for name, array in inputs.items() if name],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def _dynamic_int8_model(linear: nn.Linear) -> bytes:
    """Symmetric int8 weights per output feature, uint8 activations with one scale per tensor."""
    weight = linear.weight.T.numpy()
    scales = np.abs(weight).max(axis=0) / 127
    codes = np.rint(weight / scales).astype(np.int8)
    bias = linear.bias.numpy()
    return _model(
        linear,
        "DynamicQuantizeMatMul",
        {"b": codes, "scales": scales, "": bias[:0], "bias": bias},
    )


def _matmul_nbits_model(linear: nn.Linear, bits: int, group_size: int) -> bytes:
    """Groups with zero points, activations in int8 (accuracy level 4)."""
    n, k = linear.weight.shape
    groups = linear.weight.numpy().reshape(n, k // group_size, group_size)
    low, high = np.minimum(groups.min(axis=2), 0), np.maximum(groups.max(axis=2), 0)
    top = 2**bits - 1
    scales = ((high - low) / top).astype(np.float32)
    zeros = np.rint(-low / scales)
    codes = np.clip(np.rint(groups / scales[..., None] + zeros[..., None]), 0, top).astype(np.uint8)
    zeros = zeros.astype(np.uint8)
    codes, zeros = _pack(codes, bits), _pack(zeros, bits)
    inputs = {
        "b": codes,
        "scales": scales,
        "zeros": zeros,
        "": scales[:0],
        "bias": linear.bias.numpy(),
    }
    return _model(
        linear,
        "MatMulNBits",
        inputs,
        K=k,
        N=n,
        bits=bits,
        block_size=group_size,
        accuracy_level=4,
    )


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of 2, 4 or 8 bits, several to a byte along the last dimension, the first lowest."""
    per_byte = 8 // bits
    padding = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per_byte)]
    parts = np.pad(codes, padding).reshape(*codes.shape[:-1], -1, per_byte)
    return np.bitwise_or.reduce(parts << (bits * np.arange(per_byte, dtype=np.uint8)), axis=-1).astype(np.uint8)
