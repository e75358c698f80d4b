"""The latent ops on CUDA kernels (csrc/latent). Arguments were checked by the ops."""

import math
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ._cuda import current_stream
from ._dtypes import DTYPE_CODES
from ._latent_heads import heads_each


def attention(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The contract of `fastembed.reference.latent.attention`."""
    cuda = _module()
    keys, value_features = value.shape[2:]
    with current_stream(query.device) as stream:
        dtype = query.dtype if keys <= cuda.latent_forward_columns() else torch.float32
        out = query.new_zeros(*query.shape[:3], value_features, dtype=dtype)
        lse = query.new_full(query.shape[:3], math.inf, dtype=torch.float32)
        if lse.numel() > 0 and keys > 0:
            query, key, value = map(_aligned, (query, key, value))
            arguments = _arguments(query, key, value, keep, scale)
            cuda.latent_attention(*arguments, out.data_ptr(), lse.data_ptr(), stream)
    return out.to(query.dtype), lse


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The contract of `fastembed.reference.latent.attention_backward`."""
    cuda = _module()
    deltas = (grad.float() * out.float()).sum(dim=-1)

    def gradient(of: Tensor, columns: int) -> Tensor:
        dtype = of.dtype if columns <= cuda.latent_backward_columns else torch.float32
        return torch.zeros(of.shape, dtype=dtype, device=of.device)

    queries, keys = query.shape[2], key.shape[2]
    gradients = gradient(query, keys), gradient(key, queries), gradient(value, queries)
    if lse.numel() > 0 and keys > 0:
        grad, query, key, value = map(_aligned, (grad, query, key, value))
        with current_stream(query.device) as stream:
            cuda.latent_attention_backward(
                *_arguments(query, key, value, keep, scale),
                _rows(grad),
                lse.contiguous().data_ptr(),
                deltas.data_ptr(),
                *(result.data_ptr() for result in gradients),
                stream,
            )
    dtype = query.dtype
    return gradients[0].to(dtype), gradients[1].to(dtype), gradients[2].to(dtype)


def attend_folded(normalized: Tensor, score_weight: Tensor, score_bias: Tensor, values: Tensor) -> Tensor:
    """sum over h of softmax(normalized score_weight[h]^T + score_bias[h]) values[h], float32 [N, D].

    normalized: [N, D]; score_weight and values: [H, L, D] in its dtype; score_bias: float32 [H, L].
    """
    cuda = _module()
    heads, latents, dim = values.shape
    tokens = len(normalized)
    rows = cuda.latent_rows_float32 if normalized.dtype == torch.float32 else cuda.latent_rows_16_bit
    with current_stream(normalized.device) as stream:
        each = heads_each(tokens, heads, rows) if latents <= cuda.latent_forward_columns() else 1
        sums = normalized.new_empty(-(-heads // each), tokens, dim, dtype=torch.float32)
        if sums.numel() > 0:
            query = _aligned(normalized[None, None]).expand(1, heads, -1, -1)
            key, value = _aligned(score_weight[None]), _aligned(values[None])
            bias = score_bias.contiguous()
            arguments = _arguments(query, key, value, None, 1.0)
            cuda.latent_attend_folded(*arguments, bias.data_ptr(), each, sums.data_ptr(), stream)
    return sums.sum(dim=0) if len(sums) > 1 else sums[0]


def gated_means(values: Tensor, gates: Tensor, bias: Tensor, gate_bias: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The means over each sequence of (values + bias) * gelu(gates + gate_bias), float32 [B, C].

    values, gates: [N, C] in float32 or bfloat16; bias, gate_bias: float32 [C]; cu_seqlens: int64 [B + 1].
    """
    tokens, features = values.shape
    values, gates, bias, gate_bias, offsets = (x.contiguous() for x in (values, gates, bias, gate_bias, cu_seqlens))
    means = values.new_empty(len(offsets) - 1, features, dtype=torch.float32)
    if means.numel() > 0:
        with current_stream(values.device) as stream:
            _module().latent_gated_means(
                DTYPE_CODES[values.dtype],
                values.data_ptr(),
                gates.data_ptr(),
                features,
                bias.data_ptr(),
                gate_bias.data_ptr(),
                tokens,
                features,
                offsets.data_ptr(),
                len(means),
                means.data_ptr(),
                features,
                stream,
            )
    return means


def _module() -> Any:
    assert _native.cuda is not None, "the backend is chosen only where it is available"
    return _native.cuda


def _arguments(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float) -> tuple[Any, ...]:
    """What every launcher is told of the attention."""
    sizes = [*query.shape[:3], key.shape[2], query.shape[3], value.shape[3]]
    kept = [0, 0, 0] if keep is None else [keep.data_ptr(), *keep.stride()]
    return DTYPE_CODES[query.dtype], sizes, *map(_rows, (query, key, value)), kept, scale


def _rows(x: Tensor) -> list[int]:
    return [x.data_ptr(), *x.stride()[:3]]


def _aligned(x: Tensor) -> Tensor:
    """The tensor itself, or a copy whose rows begin at multiples of 16 bytes, as the kernels read them."""
    step = 16 // x.element_size()
    if x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(stride % step == 0 for stride in x.stride()[:3]):
        return x
    features = x.shape[3]
    return x.new_empty(*x.shape[:3], -(-features // step) * step)[..., :features].copy_(x)
