"""Attention between tokens and latents: checks, schema, fake kernel, autograd and backend choice."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _native
from ..reference import latent as reference
from ._cuda import current_stream
from ._registry import Op

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_DTYPE_CODES = {torch.bfloat16: 1, torch.float16: 2}  # those on tensor cores, as csrc/common/dtype.hpp numbers them


def latent_attention(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None = None, *, scale: float) -> Tensor:
    """softmax(scale * query key^T) value over the kept keys, for heads of any width; differentiable.

    On a GPU one kernel with an online softmax makes it, and scores are never in memory; its backward makes them again
    and adds nothing atomically. On the CPU this is PyTorch's `scaled_dot_product_attention`. After FlashAttention-2
    (arXiv 2307.08691, algorithms 1 and 2).

    Args:
        query: [B, H, S, d] or [H, S, d], in any floating dtype, which the others share.
        key: [B, H, M, d], or [H, M, d] for the whole batch.
        value: [B, H, M, d_v], or [H, M, d_v] for the whole batch.
        keep: bool [B, M], False for keys that nobody attends to; they are never read. None keeps all.
        scale: of the scores.

    Returns:
        [B, H, S, d_v], or without B like query, in its dtype. Zeros where no key is kept.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    batched = query.dim() != 3
    if not batched:
        query = query[None]
    key, value = (x.expand(len(query), *x.shape) if x.dim() == 3 else x for x in (key, value))
    _check(query, key, value, keep)
    out = (
        _latent_attention(query, key, value, keep, scale)[0]
        if has_kernels(query)
        else _plain(query, key, value, keep, scale)
    )
    return out if batched else out[0]


def has_kernels(query: Tensor) -> bool:
    """Whether the op has kernels of its own for such a tensor, where PyTorch's attention serves otherwise."""
    if torch.compiler.is_compiling():
        return query.is_cuda
    return _latent_attention.backend(query) in ("cuda", "triton")


def _plain(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float) -> Tensor:
    if keep is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    key, value = (torch.where(keep[:, None, :, None], x, 0) for x in (key, value))
    empty = ~keep.any(dim=1)[:, None, None]
    mask = keep[:, None, None] | empty[..., None]  # a row of -inf alone would be NaN, its gradient too
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _check(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None) -> None:
    if query.dim() != 4:
        raise ValueError(f"query must have shape [batch, heads, queries, features], got {list(query.shape)}")
    if not query.is_floating_point():
        raise TypeError(f"query must be floating point, got {query.dtype}")
    batch, heads, _, features = query.shape
    if key.dim() != 4 or key.shape[:2] != (batch, heads) or key.shape[3] != features:
        raise ValueError(f"key must have shape [{batch}, {heads}, keys, {features}], as query, got {list(key.shape)}")
    if value.dim() != 4 or value.shape[:3] != key.shape[:3]:
        expected = f"[{batch}, {heads}, {key.shape[2]}, value features]"
        raise ValueError(f"value must have shape {expected}, as key, got {list(value.shape)}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must be {query.dtype}, as query, got {tensor.dtype}")
    if keep is not None:
        if keep.dtype != torch.bool:
            raise TypeError(f"keep must be torch.bool, got {keep.dtype}")
        if keep.shape != (batch, key.shape[2]):
            raise ValueError(f"keep must have shape [{batch}, {key.shape[2]}], got {list(keep.shape)}")
    for name, other in (("key", key), ("value", value), ("keep", keep)):
        if other is not None and other.device != query.device:
            raise ValueError(f"{name} must be on {query.device}, where query is, got {other.device}")


def _reference(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    _check(query, key, value, keep)
    return reference.attention(query, key, value, keep, scale)


def _cuda(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    _check(query, key, value, keep)
    cuda = _native.cuda
    assert cuda is not None, "the backend is chosen only where it is available"
    keys, value_features = value.shape[2:]
    dtype = query.dtype if keys <= cuda.latent_forward_columns else torch.float32
    out = query.new_zeros(*query.shape[:3], value_features, dtype=dtype)
    lse = query.new_full(query.shape[:3], math.inf, dtype=torch.float32)
    if lse.numel() > 0 and keys > 0:
        query, key, value = map(_aligned, (query, key, value))
        with current_stream(query.device) as stream:
            arguments = _arguments(query, key, value, keep, scale)
            cuda.latent_attention(*arguments, out.data_ptr(), lse.data_ptr(), stream)
    return out.to(query.dtype), lse


def _cuda_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    cuda = _native.cuda
    assert cuda is not None, "the backend is chosen only where it is available"
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


def _arguments(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float) -> tuple[Any, ...]:
    """What every launcher is told of the attention."""
    sizes = [*query.shape[:3], key.shape[2], query.shape[3], value.shape[3]]
    kept = [0, 0, 0] if keep is None else [keep.data_ptr(), *keep.stride()]
    return _DTYPE_CODES[query.dtype], sizes, *map(_rows, (query, key, value)), kept, scale


def _rows(x: Tensor) -> list[int]:
    return [x.data_ptr(), *x.stride()[:3]]


def _aligned(x: Tensor) -> Tensor:
    """The tensor itself, or a copy whose rows begin at multiples of 16 bytes, as the CUDA kernels read them."""
    if x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:3]):
        return x
    features = x.shape[3]
    return x.new_empty(*x.shape[:3], -(-features // 8) * 8)[..., :features].copy_(x)


def _triton(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Imports Triton at the first call: it is optional, and slow to import."""
    from ..triton_kernels import latent

    _check(query, key, value, keep)
    return latent.attention(query, key, value, keep, scale)


def _triton_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ..triton_kernels import latent

    return latent.attention_backward(*args)


def _fake(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    _check(query, key, value, keep)
    out = query.new_empty(*query.shape[:3], value.shape[3])
    return out, query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))


def _backward_fake(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_latent_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None, None


_latent_attention = Op(
    "latent_attention(Tensor query, Tensor key, Tensor value, Tensor? keep, float scale) -> (Tensor, Tensor)",
    implementations={"cuda": _cuda, "triton": _triton, "cpu": _reference, "reference": _reference},
    fake=_fake,
    accepts={"cuda": frozenset(_DTYPE_CODES), "triton": _DTYPES},
    backward=_backward,
    setup_context=_setup_context,
)
_latent_attention_backward = Op(
    "latent_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? keep, Tensor out, "
    "Tensor lse, float scale) -> (Tensor, Tensor, Tensor)",
    implementations={
        "cuda": _cuda_backward,
        "triton": _triton_backward,
        "cpu": reference.attention_backward,
        "reference": reference.attention_backward,
    },
    fake=_backward_fake,
    accepts={"cuda": frozenset(_DTYPE_CODES), "triton": _DTYPES},
)
