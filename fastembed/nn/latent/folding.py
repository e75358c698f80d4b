"""How the parameters of a layer become few matrices, for inference: nothing between latents and tokens depends on data.

All in double precision and, where matrices are large, a head or some features at a time, so that what is in memory
besides stays small. docs/kernels/latent.md says why each step is exact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops import latent as ops
from ...ops.qmatmul import whole_row
from ...reference import latent as reference
from ..linear import QuantLinear
from .layer import Layer

# Hidden features of the feed-forward that are folded, or multiplied when quantised, together.
_HIDDEN_CHUNK = 2048


@dataclass(frozen=True)
class FoldedBlock:
    """NV-Embed's block as `fastembed.ops.latent.latent_pool` takes it, or with a quantised first matrix."""

    score_weight: Tensor
    score_bias: Tensor
    value_weight: Tensor
    hidden_weight: Tensor | list[QuantLinear]
    hidden_bias: Tensor
    heads: int
    eps: float


@dataclass(frozen=True)
class FoldedQueries:
    """Latents as queries: scores = LN(x) score_weight^T; values and their bias with the LayerNorm folded in."""

    score_weight: Tensor  # [H * L, D]
    value_weight: Tensor  # [H, d_h, D]
    value_bias: Tensor  # [H * d_h]
    projected: Tensor  # [L, H * d_h], the latents as queries
    eps: float | None  # of the LayerNorm of the tokens; None where they have none


def fold_block(layer: Layer, latents: Tensor, bits: int | None) -> FoldedBlock:
    """Tokens as queries; `bits` of the feed-forward's first matrix on the CPU, None for one that is not quantised."""
    low = latents.dtype if latents.dtype in (torch.bfloat16, torch.float64) else torch.float32
    packs = latents.device.type == "cpu" and low != torch.float64
    scores, score_bias, values = _fold_attention(layer, latents, low)
    assert isinstance(layer.ffn_in, nn.Linear)
    assert isinstance(layer.norm_q, nn.LayerNorm)
    hidden, hidden_bias = _fold_hidden(layer.ffn_in, layer.norm_ffn, low, packs, bits)
    if packs:
        scores, values = ops.pack_weight(scores), ops.pack_weight(values)
    return FoldedBlock(scores, score_bias, values, hidden, hidden_bias, layer.heads, layer.norm_q.eps)


def _fold_attention(layer: Layer, latents: Tensor, low: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and bias of the scores, [H * L, D] and [H * L], and the values [D, H * L], with what comes after them."""
    assert isinstance(layer.to_out, nn.Linear)
    count, dim = latents.shape
    head_dim = layer.to_q.out_features // layer.heads
    accumulate = torch.promote_types(low, torch.float32)
    context = _normed(latents.double(), layer.norm_kv)
    scores = latents.new_empty(layer.heads * count, dim, dtype=low)
    score_bias = latents.new_empty(layer.heads * count, dtype=accumulate)
    # As GPU kernels read it, latent by latent; those of the CPU read panels.
    values = latents.new_empty(layer.heads * count, dim, dtype=low).T
    for head in range(layer.heads):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        columns = slice(head * count, (head + 1) * count)
        keys = _linear(context, layer.to_k, rows)
        weight = reference.fold_scores(layer.to_q.weight[rows].double(), keys, layer.scale)
        bias = None if layer.to_q.bias is None else keys @ layer.to_q.bias[rows].double() * layer.scale
        weight, bias = reference.fold_norm(weight, bias, *_affine(layer.norm_q))
        scores[columns], score_bias[columns] = weight.to(low), bias.to(accumulate)
        del keys, weight
        head_values = _linear(context, layer.to_v, rows)
        values[:, columns] = (layer.to_out.weight[:, rows].double() @ head_values.T).to(low)
    return scores, score_bias, values


def _fold_hidden(
    linear: nn.Linear, norm: nn.Module, low: torch.dtype, packs: bool, bits: int | None
) -> tuple[Tensor | list[QuantLinear], Tensor]:
    """The feed-forward's first matrix with its LayerNorm, by chunks of values and their gates."""
    gain, shift = _affine(norm)
    half = linear.out_features // 2
    accumulate = torch.promote_types(low, torch.float32)
    biases = linear.weight.new_empty(2, half, dtype=accumulate)
    plain: list[tuple[Tensor, Tensor]] = []
    packed: list[Tensor] = []
    quantized: list[QuantLinear] = []
    for first in range(0, half, _HIDDEN_CHUNK):
        columns = slice(first, min(half, first + _HIDDEN_CHUNK))
        parts = []
        for side, rows in enumerate((columns, slice(half + columns.start, half + columns.stop))):
            bias = None if linear.bias is None else linear.bias[rows].double()
            weight, bias = reference.fold_norm(linear.weight[rows].double(), bias, gain, shift)
            biases[side, columns] = bias.to(accumulate)
            parts.append(weight.to(low))
        if bits is not None and packs:
            quantized.append(_quantized(torch.cat(parts), biases[:, columns].flatten(), bits))
        elif packs:
            packed.append(ops.pack_weight(torch.cat(parts), gated=True))
        else:
            plain.append((parts[0], parts[1]))
    if quantized:
        return quantized, biases.flatten()
    if packed:
        return _joined(packed), biases.flatten()
    return torch.cat([part for side in zip(*plain, strict=True) for part in side]), biases.flatten()


def _quantized(weight: Tensor, bias: Tensor, bits: int) -> QuantLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight.float(), False), nn.Parameter(bias, False)
    # At 8 bits one scale per row loses nothing that matters, and leaves the inner loop to the products.
    group_size = whole_row(weight.shape[1]) if bits == 8 else 64
    return QuantLinear.from_linear(linear, bits=bits, group_size=group_size, symmetric=bits == 8)


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts one after the other; each is given up once it is copied."""
    whole = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    first = 0
    while parts:
        part = parts.pop(0)
        whole[first : first + len(part)] = part
        first += len(part)
    return whole


def fold_queries(layer: Layer, latents: Tensor) -> FoldedQueries:
    """Latents as queries: scores of the tokens themselves, which are averaged before values and output."""
    low, norm = latents.dtype, layer.norm_kv
    queries = layer.split(_linear(_normed(latents.double(), layer.norm_q), layer.to_q))
    key_weight = layer.to_k.weight.double().unflatten(0, (layer.heads, -1))
    # A constant per query cancels in the softmax: neither the keys' bias nor the LayerNorm's shift matters there.
    scores = (queries @ key_weight).flatten(0, 1) * layer.scale
    value_weight, value_bias = layer.to_v.weight.double(), layer.to_v.bias
    constant = value_weight.new_zeros(len(value_weight)) if value_bias is None else value_bias.double()
    if isinstance(norm, nn.LayerNorm):
        gain, shift = _affine(norm)
        scores = scores * gain
        constant = constant + value_weight @ shift
        value_weight = value_weight * gain
    return FoldedQueries(
        scores.to(low),
        value_weight.unflatten(0, (layer.heads, -1)).to(low),
        constant.to(low),
        layer.to_q(layer.norm_q(latents)),
        norm.eps if isinstance(norm, nn.LayerNorm) else None,
    )


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(norm, nn.LayerNorm)
    return norm.weight.double(), norm.bias.double()


def _normed(x: Tensor, norm: nn.Module) -> Tensor:
    """`norm` in the dtype of x, where it is one."""
    if not isinstance(norm, nn.LayerNorm):
        return x
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def _linear(x: Tensor, linear: nn.Linear, rows: slice = slice(None)) -> Tensor:
    """Some output features of `linear` in the dtype of x."""
    bias = None if linear.bias is None else linear.bias[rows].to(x.dtype)
    return F.linear(x, linear.weight[rows].to(x.dtype), bias)
