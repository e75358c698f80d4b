"""Low-bit linear layers: checks, schema, fake kernel, autograd and backend choice."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, get_num_threads

from .. import _native, backends
from .._native import core
from ..reference import qmatmul as reference
from ._cuda import current_stream
from ._dtypes import DTYPE_CODES
from ._registry import Op, is_plain_eager

EPILOGUES = (None, "gelu", "gelu_tanh", "relu", "silu")
ACTIVATIONS = ("int8", "float")
BITS = range(1, 9)
GROUP_MULTIPLE = 16
# Products of 8-bit codes and activations are summed in int32 within a group.
MAX_GROUP_FEATURES = 65536

# As csrc/qmatmul/kernels.hpp numbers them.
_NO_ZEROS, _CODE_ZEROS, _FRACTIONAL_ZEROS = range(3)

# What the code that torch.compile generates takes its memory from: without the dispatcher, in half the time.
_empty_strided = getattr(
    torch._C._dynamo.guards,
    "_empty_strided_cpu",
    lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype),
)


def qlinear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    out_features: int,
    epilogue: str | None = None,
    activations: str = "int8",
) -> Tensor:
    """A linear layer on packed low-bit weights.

    `fastembed.nn.QuantLinear` owns such weights; `fastembed.reference.qmatmul` defines the layout and the arithmetic.

    Args:
        x: [..., in_features], float32, bfloat16 or float16. A token (row) with a NaN or infinite entry gives NaN
            outputs; the other tokens are not affected.
        codes: uint8 [panels, ceil(in_features / 4), 32 * bits], panels = ceil(out_features / 64).
        scales: float16, bfloat16 or float32 [panels, groups, 64], groups = ceil(in_features / group_size).
        zeros: shaped as scales, uint8 or in their dtype (then fractional values are allowed); or None for symmetric
            codes, whose zero point is 2**(bits - 1), and 0.5 for one bit.
        bias: [out_features] in any of x's dtypes, or None.
        residual: [..., out_features] in x's dtype, added after the epilogue; or None.
        bits: 1 to 8.
        group_size: a positive multiple of 16. May exceed in_features: then a whole row is one group, of at most 65536.
        out_features: rows of the weight.
        epilogue: None, "gelu" (erf), "gelu_tanh", "relu" or "silu", applied after the bias.
        activations: "int8": quantised per token on the way in, products accumulated in int32 within a group and in
            float32 across groups. "float": taken as they are, the weights dequantised exactly (to float32; see
            `dequantize_weight`), accumulated in float32.

    Returns:
        [..., out_features] in x's dtype, rounded once.
        The gradient reaches x (straight through the rounding of the activations), bias and residual; weights have none.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    return _qlinear(x, codes, scales, zeros, bias, residual, bits, group_size, out_features, epilogue, activations)


def dequantize_weight(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
) -> Tensor:
    """The float32 weight [out_features, in_features] that packed codes stand for; arguments as in `qlinear`."""
    return _dequantize(codes, scales, zeros, bits, group_size, out_features, in_features)


def whole_row(in_features: int) -> int:
    """The group size that makes one group of every row."""
    return max(1, -(-in_features // GROUP_MULTIPLE)) * GROUP_MULTIPLE


def check_configuration(bits: int, group_size: int, epilogue: str | None, activations: str = "int8") -> None:
    """Raise ValueError for settings that no backend implements."""
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in BITS:
        raise ValueError(f"bits must be {BITS.start} to {BITS.stop - 1}, got {bits!r}")
    if not isinstance(group_size, int) or group_size <= 0 or group_size % GROUP_MULTIPLE:
        raise ValueError(f"group_size must be a positive multiple of {GROUP_MULTIPLE}, got {group_size!r}")
    if epilogue not in EPILOGUES:
        raise ValueError(f"epilogue must be one of {', '.join(map(repr, EPILOGUES))}, got {epilogue!r}")
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations must be {' or '.join(map(repr, ACTIVATIONS))}, got {activations!r}")


def _check_weight(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, n: int, k: int
) -> None:
    panels = -(-n // reference.PANEL)
    _check_tensor("codes", codes, (panels, -(-k // reference.QUAD), 32 * bits), torch.uint8, codes.device)
    if min(group_size, k) > MAX_GROUP_FEATURES:
        raise ValueError(f"group_size must be at most {MAX_GROUP_FEATURES} for {k} in_features, got {group_size}")
    per_group = (panels, -(-k // group_size), reference.PANEL)
    if scales.dtype not in DTYPE_CODES:
        raise TypeError(f"scales must be float32, bfloat16 or float16, got {scales.dtype}")
    _check_tensor("scales", scales, per_group, scales.dtype, codes.device)
    if zeros is not None:
        if zeros.dtype not in (torch.uint8, scales.dtype):
            raise TypeError(f"zeros must be torch.uint8 or {scales.dtype} like the scales, got {zeros.dtype}")
        _check_tensor("zeros", zeros, per_group, zeros.dtype, codes.device)


def _check_bias(bias: Tensor | None, out_features: int, device: torch.device) -> None:
    if bias is None:
        return
    if bias.dtype not in DTYPE_CODES:
        raise TypeError(f"bias must be float32, bfloat16 or float16, got {bias.dtype}")
    _check_tensor("bias", bias, (out_features,), bias.dtype, device)


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, where the other tensors are, got {tensor.device}")


def _check(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    epilogue: str | None,
    activations: str,
) -> None:
    check_configuration(bits, group_size, epilogue, activations)
    if x.dtype not in DTYPE_CODES:
        raise wrong_dtype(x)
    if x.dim() == 0:
        raise wrong_features(x, codes.shape[1] * reference.QUAD)
    if x.device != codes.device:
        raise ValueError(f"x must be on {codes.device}, where the weight is, got {x.device}")
    if codes.dim() == 3 and -(-x.shape[-1] // reference.QUAD) != codes.shape[1]:
        raise ValueError(
            f"x must end in a dimension of the weight's in_features (at most {codes.shape[1] * reference.QUAD}), "
            f"got shape {list(x.shape)}"
        )
    _check_weight(codes, scales, zeros, bits, group_size, out_features, x.shape[-1])
    _check_bias(bias, out_features, x.device)
    if residual is not None:
        _check_tensor("residual", residual, (*x.shape[:-1], out_features), x.dtype, x.device)


def _reference(x: Tensor, *args: Any) -> Tensor:
    _check(x, *args)
    return reference.qlinear(x, *args)


class Layer:
    """A layer's checked tensors and the core's handle on them: what `prepare` makes, for calls that check only x.

    It keeps the tensors it was made of, and `is_of` tells whether these are still the ones, and where they were.
    """

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bias: Tensor | None,
        bits: int,
        group_size: int,
        in_features: int,
        out_features: int,
        epilogue: str | None,
        activations: str,
    ) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self._strides = (max(1, out_features), 1)  # of the outputs of a batch of tokens
        self._epilogue = epilogue
        self._activations = activations
        self._tensors = (codes, scales, zeros, bias)
        self._addresses = [_address(tensor) for tensor in self._tensors]
        # A copy of a strided tensor would not follow its changes, so such a layer is prepared anew for every call.
        self.is_lasting = all(tensor is None or tensor.is_contiguous() for tensor in self._tensors)
        self._kept = [None if tensor is None else tensor.contiguous() for tensor in self._tensors]
        self.handle = core.QLinear(
            in_features,
            out_features,
            _address(self._kept[0]),
            _address(self._kept[1]),
            DTYPE_CODES[scales.dtype],
            _address(self._kept[2]),
            _kind(zeros),
            bits,
            group_size,
            _address(self._kept[3]),
            0 if bias is None else DTYPE_CODES[bias.dtype],
            EPILOGUES.index(epilogue),
            ACTIVATIONS.index(activations),
        )

    def is_of(
        self,
        buffers: Mapping[str, Tensor | None],
        epilogue: str | None,
        activations: str,
    ) -> bool:
        codes, scales, zeros, bias = self._tensors
        codes_at, scales_at, zeros_at, bias_at = self._addresses
        return (
            buffers["codes"] is codes
            and buffers["scales"] is scales
            and buffers["zeros"] is zeros
            and buffers["bias"] is bias
            and codes.data_ptr() == codes_at
            and scales.data_ptr() == scales_at
            and (zeros is None or zeros.data_ptr() == zeros_at)
            and (bias is None or bias.data_ptr() == bias_at)
            and epilogue == self._epilogue
            and activations == self._activations
        )

    def run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The layer on an x, and a residual if there is one, that `runs_prepared` has passed."""
        stride = self.in_features
        shape = x.shape
        if not shape or shape[-1] != stride:
            raise wrong_features(x, stride)
        dtype = DTYPE_CODES.get(x.dtype)
        if dtype is None:
            raise wrong_dtype(x)
        if len(shape) == 2:
            count = shape[0]
            y = _empty_strided((count, self.out_features), self._strides, x.dtype)
        else:
            count = shape[:-1].numel()
            y = x.new_empty(*shape[:-1], self.out_features)
        if not x.is_contiguous():
            x = _as_rows(x)
            stride = x.stride(0)
        address = 0
        if residual is not None:
            _check_tensor("residual", residual, y.shape, x.dtype, x.device)
            residual = residual.contiguous()
            address = residual.data_ptr()
        self.handle(x.data_ptr(), dtype, count, stride, address, y.data_ptr(), get_num_threads())
        return y


def prepare(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    epilogue: str | None,
    activations: str,
) -> Layer:
    """Check a layer's tensors, as in `qlinear`, once for many calls on the CPU. Raises as `qlinear` does."""
    check_configuration(bits, group_size, epilogue, activations)
    if not codes.is_cpu:
        raise ValueError(f"x must be on {codes.device}, where the weight is, got cpu")
    _check_weight(codes, scales, zeros, bits, group_size, out_features, in_features)
    _check_bias(bias, out_features, codes.device)
    return Layer(codes, scales, zeros, bias, bits, group_size, in_features, out_features, epilogue, activations)


def run_together(layers: Sequence[Layer], x: Tensor) -> tuple[Tensor, ...]:
    """Layers of the same in_features on a checked x, which is quantised once: what each alone would return."""
    rows = _as_rows(x)
    outputs = tuple(x.new_empty(*x.shape[:-1], layer.out_features) for layer in layers)
    core.qlinears(
        [(layer.handle, y.data_ptr()) for layer, y in zip(layers, outputs, strict=True)],
        rows.data_ptr(),
        DTYPE_CODES[x.dtype],
        rows.shape[0],
        rows.stride(0),
        torch.get_num_threads(),
    )
    return outputs


def runs_prepared(x: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> bool:
    """Whether x may go straight to a prepared layer: plain eager inference on the CPU, with no other backend forced."""
    return x.is_cpu and is_plain_eager((x, bias, residual)) and (backends.requested_backend() or "cpu") == "cpu"


def wrong_dtype(x: Tensor) -> TypeError:
    """The error for an x that no layer takes."""
    return TypeError(f"x must be float32, bfloat16 or float16, got {x.dtype}")


def wrong_features(x: Tensor, in_features: int) -> ValueError:
    """The error for an x that no layer of `in_features` takes."""
    if x.dim() == 0:
        return ValueError("x must have at least one dimension, got a scalar")
    return ValueError(f"x must have {in_features} features in its last dimension, got {list(x.shape)}")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _as_rows(x: Tensor) -> Tensor:
    """x as [rows, in_features], with features next to each other."""
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def _cpu(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    epilogue: str | None,
    activations: str,
) -> Tensor:
    _check(x, codes, scales, zeros, bias, residual, bits, group_size, out_features, epilogue, activations)
    layer = Layer(codes, scales, zeros, bias, bits, group_size, x.shape[-1], out_features, epilogue, activations)
    return layer.run(x, residual)


def _cuda(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    epilogue: str | None,
    activations: str,
) -> Tensor:
    if activations == "float":
        return _dequantized(x, codes, scales, zeros, bias, residual, bits, group_size, out_features, epilogue)
    _check(x, codes, scales, zeros, bias, residual, bits, group_size, out_features, epilogue, activations)
    rows = _as_rows(x)
    y = x.new_empty(*x.shape[:-1], out_features)
    codes, scales = _aligned(codes), _aligned(scales)
    zeros = None if zeros is None else _aligned(zeros)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    cuda = _native.cuda
    assert cuda is not None, "the backend is chosen only where it is available"
    with current_stream(x.device) as stream:
        needed = cuda.qlinear_workspace(rows.shape[0], x.shape[-1], out_features)
        workspace = x.new_empty(needed, dtype=torch.uint8)
        cuda.qlinear(
            rows.data_ptr(),
            DTYPE_CODES[x.dtype],
            rows.shape[0],
            x.shape[-1],
            rows.stride(0),
            codes.data_ptr(),
            scales.data_ptr(),
            DTYPE_CODES[scales.dtype],
            _address(zeros),
            _kind(zeros),
            bits,
            group_size,
            _address(bias),
            0 if bias is None else DTYPE_CODES[bias.dtype],
            out_features,
            EPILOGUES.index(epilogue),
            _address(residual),
            y.data_ptr(),
            workspace.data_ptr(),
            stream,
        )
    return y


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where it lies as the CUDA kernels cannot read it."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _kind(zeros: Tensor | None) -> int:
    return _NO_ZEROS if zeros is None else _CODE_ZEROS if zeros.dtype == torch.uint8 else _FRACTIONAL_ZEROS


def _triton(x: Tensor, *args: Any) -> Tensor:
    """Imports Triton at the first call: it is optional, and slow to import."""
    from ..triton_kernels import qmatmul

    *settings, activations = args
    if activations == "float":
        return _dequantized(x, *settings)
    _check(x, *args)
    return qmatmul.qlinear(x, *settings)


def _dequantized(*args: Any) -> Tensor:
    """Float activations on a GPU: PyTorch's own product with the dequantised weight, as the reference defines it."""
    return _reference(*args, "float")


def _fake(x: Tensor, *args: Any) -> Tensor:
    _check(x, *args)
    out_features = args[7]
    return x.new_empty(*x.shape[:-1], out_features)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scales, zeros, bias, _, *ctx.settings = inputs
    ctx.save_for_backward(x, codes, scales, zeros, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, codes, scales, zeros, bias = ctx.saved_tensors
    bits, group_size, out_features, epilogue, activations = ctx.settings
    grad_residual = grad if ctx.needs_input_grad[5] else None
    grad = grad.float()
    if epilogue is not None:
        before = _qlinear(x, codes, scales, zeros, bias, None, bits, group_size, out_features, None, activations)
        grad = reference.epilogue_gradient(grad, before.float(), epilogue)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = _dequantize(codes, scales, zeros, bits, group_size, out_features, x.shape[-1])
        grad_x = (grad @ weight).to(x.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, out_features).sum(dim=0).to(bias.dtype)
    return grad_x, None, None, None, grad_bias, grad_residual, None, None, None, None, None


def _dequantize_reference(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, n: int, k: int
) -> Tensor:
    check_configuration(bits, group_size, None)
    _check_weight(codes, scales, zeros, bits, group_size, n, k)
    return reference.dequantize_weight(codes, scales, zeros, bits, group_size, n, k)


def _dequantize_fake(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, n: int, k: int
) -> Tensor:
    check_configuration(bits, group_size, None)
    _check_weight(codes, scales, zeros, bits, group_size, n, k)
    return codes.new_empty(n, k, dtype=torch.float32)


_qlinear = Op(
    "qlinear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, Tensor? residual, int bits, "
    "int group_size, int out_features, str? epilogue, str activations) -> Tensor",
    implementations={"cpu": _cpu, "cuda": _cuda, "triton": _triton, "reference": _reference},
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_dequantize = Op(
    "dequantize_weight(Tensor codes, Tensor scales, Tensor? zeros, int bits, int group_size, int out_features, "
    "int in_features) -> Tensor",
    implementations={"reference": _dequantize_reference},
    fake=_dequantize_fake,
)
