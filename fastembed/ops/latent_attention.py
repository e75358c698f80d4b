"""Attention between tokens and latents: checks, schema, fake kernel, autograd and backend choice."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..reference import latent as reference
from . import _latent_cuda
from ._registry import Op

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


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
    return _latent_cuda.attention(query, key, value, keep, scale)


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
    accepts={"cuda": _DTYPES, "triton": _DTYPES},
    backward=_backward,
    setup_context=_setup_context,
)
_latent_attention_backward = Op(
    "latent_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? keep, Tensor out, "
    "Tensor lse, float scale) -> (Tensor, Tensor, Tensor)",
    implementations={
        "cuda": _latent_cuda.attention_backward,
        "triton": _triton_backward,
        "cpu": reference.attention_backward,
        "reference": reference.attention_backward,
    },
    fake=_backward_fake,
    accepts={"cuda": _DTYPES, "triton": _DTYPES},
)
