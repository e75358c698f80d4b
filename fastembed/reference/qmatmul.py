"""Low-bit linear layers in plain PyTorch: the layout of packed weights, and the arithmetic on them.

    w[n, k] = scale[n, g] * (code[n, k] - zero[n, g])            g = k // group_size, codes of 1 to 8 bits
    a[m, k] = round(x[m, k] * 127 / amax[m])                     int8, amax[m] the largest |x[m, k]| of the token
    y[m, n] = act(amax[m] / 127 * sum_g scale[n, g] * sum_{k in g} a[m, k] * (code[n, k] - zero[n, g]) + bias[n])
              + residual[m, n]

A zero point is stored as a code (uint8), as a number in code units (the dtype of the scales), or not at all: then it is
2**(bits - 1), and 0.5 for one bit. The inner sum is taken over code - origin, an integer (the stored code, else
2**(bits - 1)), and is exact; where the origin is not the zero point, scale * (origin - zero) times the sum of the
group's a[m, k] follows in float32. The outer sum is float32 in the order of the groups, so a row's result does not
depend on the other rows.

With float activations, a[m, k] is x[m, k] itself and w[n, k] is rounded to float32, once:

    y[m, n] = act(sum_k x[m, k] * w[n, k] + bias[n]) + residual[m, n]

Packed codes are one layout for every bit-width and every CPU: panels of 64 output features; within a panel, for every 4
input features, 256 codes in 32 * bits bytes, as four tiles of 16 output features. A tile is eight little-endian words
of `bits` bytes, each with 8 codes: 2 output features by 4 input features, which is one 64-bit lane of a register that
an int8 dot-product instruction takes. Output features are padded to 64 and input features to 4 with code 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 64
TILES = 4
QUAD = 4
LANES = 8

# Below this a token's largest activation counts as this much, so that 127 / amax stays finite.
SMALLEST_AMAX = 2.0**-100


def qlinear(
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
    """The layer on x [..., in_features]; see `fastembed.ops.qmatmul.qlinear`."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if activations == "int8":
        y = _int8_products(rows, codes, scales, zeros, bits, group_size, out_features)
    else:
        weight = dequantize_weight(codes, scales, zeros, bits, group_size, out_features, x.shape[-1])
        y = rows.float() @ weight.T
    if bias is not None:
        y = y + bias.float()
    y = apply_epilogue(y, epilogue).reshape(*x.shape[:-1], out_features)
    if residual is not None:
        y = y + residual.float()
    return y.to(x.dtype)


def _int8_products(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, out_features: int
) -> Tensor:
    """x [M, K] quantised to int8, times the weights: float32 [M, N]."""
    in_features = x.shape[1]
    activations, token_scales = quantize_activations(x)
    weights = unpack_codes(codes, bits, out_features, in_features).double()
    scales = from_panels(scales, out_features).float()
    zeros = None if zeros is None else from_panels(zeros, out_features)
    origins = (
        zeros.float() if zeros is not None and zeros.dtype == torch.uint8 else torch.full_like(scales, origin(bits))
    )
    shifts = scales * (origins - zero_points(scales, zeros, bits))
    total = torch.zeros(activations.shape[0], out_features, device=x.device)
    for group in range(scales.shape[1]):
        # Products and sums of these integers are exact in float64.
        a = activations[:, group * group_size : (group + 1) * group_size].double()
        signed = weights[:, group * group_size : (group + 1) * group_size] - origins[:, group, None].double()
        total += (a @ signed.T).float() * scales[:, group]
        total += a.sum(dim=1, keepdim=True).float() * shifts[:, group]
    return total * token_scales


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [M, K] of x [M, K], and a float32 scale [M, 1] per token: NaN where the token is not finite."""
    x = x.float()
    if x.shape[1] == 0:
        return x.to(torch.int8), x.new_zeros(x.shape[0], 1)
    amax = x.abs().amax(dim=1, keepdim=True)
    finite = amax.isfinite()
    amax = amax.clamp(min=SMALLEST_AMAX)
    # A tensor as the dividend: `127.0 / amax` is computed as amax.reciprocal() * 127.0, which rounds twice.
    codes = torch.where(finite, x * (torch.full_like(amax, 127.0) / amax), 0).round()
    return codes.to(torch.int8), torch.where(finite, amax * (1.0 / 127.0), float("nan"))


def apply_epilogue(y: Tensor, epilogue: str | None) -> Tensor:
    """What follows the bias, by the name that QuantLinear gives it."""
    if epilogue == "relu":
        return y.relu()
    if epilogue == "silu":
        return F.silu(y)
    if epilogue is not None:
        return F.gelu(y, approximate="tanh" if epilogue == "gelu_tanh" else "none")
    return y


def epilogue_gradient(grad: Tensor, y: Tensor, epilogue: str | None) -> Tensor:
    """Gradient with respect to y, from the gradient of `apply_epilogue(y, epilogue)`."""
    if epilogue == "relu":
        return grad * (y > 0)
    if epilogue == "silu":
        return torch.ops.aten.silu_backward(grad, y)
    if epilogue is not None:
        return torch.ops.aten.gelu_backward(grad, y, approximate="tanh" if epilogue == "gelu_tanh" else "none")
    return grad


def dequantize_weight(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
) -> Tensor:
    """The float32 weight [out_features, in_features] that packed codes stand for."""
    weights = unpack_codes(codes, bits, out_features, in_features).float()
    groups = torch.arange(in_features, device=codes.device) // group_size
    midpoints = from_panels(zero_points(scales, zeros, bits), out_features)
    return (weights - midpoints[:, groups]) * from_panels(scales, out_features).float()[:, groups]


def zero_points(scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """Zero points, shaped as the scales, in float32: those stored, or the midpoint of symmetric codes."""
    return torch.full_like(scales, midpoint(bits), dtype=torch.float32) if zeros is None else zeros.float()


def midpoint(bits: int) -> float:
    """What stands for 0 in symmetric quantisation: the middle code, and 0.5, which is no code, for one bit."""
    return 0.5 if bits == 1 else origin(bits)


def origin(bits: int) -> int:
    """The integer that products are taken against where the zero point is not a stored code."""
    return 1 << (bits - 1)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, K], uint8 below 2**bits, to the packed layout [ceil(N / 64), ceil(K / 4), 32 * bits]."""
    rows, columns = codes.shape
    codes = F.pad(codes, (0, -columns % QUAD, 0, -rows % PANEL))
    panels, quads = codes.shape[0] // PANEL, codes.shape[1] // QUAD
    # Words of eight codes, one plane for each place in the word: [2 * QUAD, panels, quads, TILES, LANES].
    planes = codes.reshape(panels, TILES, LANES, 2, quads, QUAD).permute(3, 5, 0, 4, 1, 2).flatten(0, 1).contiguous()
    packed = codes.new_zeros(bits, *planes.shape[1:])
    for place, plane in enumerate(planes):
        octet, shift = divmod(bits * place, 8)
        packed[octet] |= plane << shift
        if shift + bits > 8:
            packed[octet + 1] |= plane >> (8 - shift)
    return packed.permute(1, 2, 3, 4, 0).flatten(2)


def unpack_codes(packed: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """Inverse of `pack_codes`: uint8 [rows, columns]."""
    panels, quads, _ = packed.shape
    octets = packed.reshape(panels, quads, TILES, LANES, bits).permute(4, 0, 1, 2, 3).contiguous()
    planes = packed.new_empty(8, *octets.shape[1:])
    for place, plane in enumerate(planes):
        octet, shift = divmod(bits * place, 8)
        torch.bitwise_right_shift(octets[octet], shift, out=plane)
        if shift + bits > 8:
            plane |= octets[octet + 1] << (8 - shift)
    planes &= (1 << bits) - 1
    fields = planes.unflatten(0, (2, QUAD)).permute(2, 4, 5, 0, 3, 1)
    return fields.reshape(panels * PANEL, quads * QUAD)[:rows, :columns].contiguous()


def to_panels(values: Tensor) -> Tensor:
    """Per-group values [N, groups] as the kernels read them: [ceil(N / 64), groups, 64], padded with 0."""
    rows, groups = values.shape
    padded = F.pad(values, (0, 0, 0, -rows % PANEL))
    return padded.reshape(padded.shape[0] // PANEL, PANEL, groups).transpose(1, 2).contiguous()


def from_panels(values: Tensor, rows: int) -> Tensor:
    """Inverse of `to_panels`: [rows, groups]."""
    panels, groups, _ = values.shape
    return values.transpose(1, 2).reshape(panels * PANEL, groups)[:rows]
