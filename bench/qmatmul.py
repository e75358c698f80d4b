"""Low-bit linear layers beside PyTorch's and ONNX Runtime's.

The linear layers of real text encoders (MiniLM: 384 and 1536; BERT-base: 768 and 3072; BERT-large: 1024 and 4096),
from one token to a large batch. Weights and activations are Gaussian; the error is relative to the float64 layer, so it
holds the rounding of the weights as well as that of the activations, and differs by bits rather than by library.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from fastembed.nn import QuantLinear

from . import Case, Context, Faster, Workload, optional_import

onnx = optional_import("onnx")
onnxruntime = optional_import("onnxruntime")

SHAPES = ((384, 384), (1536, 384), (384, 1536), (3072, 768), (4096, 1024))  # out_features, in_features
ROWS = (1, 8, 64, 512, 2048)
QUICK_FEATURES, QUICK_ROWS = 128, 8

# Relative errors that the bits explain: 4-bit round-to-nearest in groups is near 0.1 on Gaussian weights.
TOLERANCE = {4: 0.15, 8: 0.03, 32: 1e-4}

Provider = Callable[[], Tensor]


def cases() -> Iterator[Case]:
    for out_features, in_features in SHAPES:
        for rows in ROWS:
            yield Case(
                f"{out_features}x{in_features}, {rows} token{'s' if rows > 1 else ''}",
                partial(_workload, out_features=out_features, in_features=in_features, rows=rows),
            )


def _workload(context: Context, out_features: int, in_features: int, rows: int) -> Workload:
    if context.quick:
        out_features = in_features = QUICK_FEATURES
        rows = min(rows, QUICK_ROWS)
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features).eval().requires_grad_(False)
    nn.init.normal_(linear.weight, std=in_features**-0.5)
    x = torch.randn(rows, in_features)
    expected = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    providers: dict[str, Provider] = {}
    tolerance: dict[str, float] = {}
    for name, bits, call in _providers(linear, x, context.threads):
        providers[name] = call
        tolerance[name] = TOLERANCE[bits]
    operations = 2.0 * rows * in_features * out_features
    goals = [Faster("torch float32", 4.0), Faster("ONNX Runtime dynamic int8", 0.95)] if rows >= 64 else []
    return Workload(
        providers=providers,
        verify=lambda _, y: float((y.double() - expected).norm() / expected.norm()),
        tolerance=tolerance,
        amount=operations,
        unit="op",
        demands={"int8": operations},
        goals=goals,
    )


def _providers(linear: nn.Linear, x: Tensor, threads: int) -> Iterable[tuple[str, int, Provider]]:
    """Name, bits of the weights, call."""
    yield "fastembed", 4, _inference(QuantLinear.from_linear(linear, bits=4, group_size=64), x)
    yield "fastembed 4-bit, groups of 128", 4, _inference(QuantLinear.from_linear(linear, bits=4, group_size=128), x)
    yield "fastembed 8-bit, groups of 64", 8, _inference(QuantLinear.from_linear(linear, bits=8, group_size=64), x)
    yield "torch float32", 32, _inference(linear, x)
    if "x86" in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = "x86"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and still what PyTorch users have
            dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)
        yield "torch dynamic int8", 8, _inference(dynamic, x)
    if onnx is not None and onnxruntime is not None:
        yield "ONNX Runtime dynamic int8", 8, _onnx_call(_dynamic_int8_model(linear), x, threads)
        for bits in (4, 8):
            name = f"ONNX Runtime MatMulNBits {bits}-bit, groups of 64"
            yield name, bits, _onnx_call(_matmul_nbits_model(linear, bits, 64), x, threads)


def _inference(module: nn.Module, x: Tensor) -> Provider:
    def call() -> Tensor:
        with torch.inference_mode():
            return module(x)

    return call


def _onnx_call(model: bytes, x: Tensor, threads: int) -> Provider:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # As for the other libraries here: threads that wait for work sleep instead of spinning on the cores of the next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    inputs = {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def _onnx_model(linear: nn.Linear, op: str, inputs: dict[str, np.ndarray], **attributes: int) -> bytes:
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
    return _onnx_model(linear, "DynamicQuantizeMatMul", {"b": codes, "scales": scales, "": bias[:0], "bias": bias})


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
    if bits == 4:
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
        zeros = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))
        zeros = zeros[:, 0::2] | zeros[:, 1::2] << 4
    inputs = {"b": codes, "scales": scales, "zeros": zeros, "": scales[:0], "bias": linear.bias.numpy()}
    return _onnx_model(linear, "MatMulNBits", inputs, K=k, N=n, bits=bits, block_size=group_size, accuracy_level=4)
