"""Multi-exit pooling in plain PyTorch, forward and backward.

    p      = reduce over the valid tokens t of h_e[b, t]        in float32 (float64 stays float64)
    y_k    = p[:k] / max(||p[:k]||_2, 1e-12)                     for every requested prefix k

A sequence without valid tokens gives zeros, and what stands in padding never matters, NaN included.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

NORM_EPS = 1e-12


def pool_exits(
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    mode: str,
    dims: Sequence[Sequence[int]],
    normalize: bool,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    """Pool every exit; see `fastembed.pool_exits`. Returns [B, dim] tensors, exit by exit, dims in the order given."""
    check_values(attention_mask, cu_seqlens, hidden_states[0].shape)
    outputs = []
    for hidden, exit_dims in zip(hidden_states, dims, strict=True):
        pooled = _reduce(*_padded(hidden, attention_mask, cu_seqlens), mode)
        for dim in exit_dims:
            prefix = pooled[:, :dim]
            if normalize:
                prefix = prefix / prefix.norm(dim=1, keepdim=True).clamp(min=NORM_EPS)
            outputs.append(prefix.to(out_dtype, copy=True, memory_format=torch.contiguous_format))
    return outputs


def pool_exits_backward(
    hidden_states: Sequence[Tensor],
    grads: Sequence[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    mode: str,
    dims: Sequence[Sequence[int]],
    normalize: bool,
) -> list[Tensor]:
    """Gradients of the hidden states from those of the outputs, recomputing what the forward did not keep."""
    remaining = iter(grads)
    results = []
    for hidden, exit_dims in zip(hidden_states, dims, strict=True):
        tokens, mask = _padded(hidden, attention_mask, cu_seqlens)
        pooled = _reduce(tokens, mask, mode)
        grad_pooled = torch.zeros_like(pooled)
        for dim in exit_dims:
            grad = next(remaining).to(pooled.dtype)
            grad_pooled[:, :dim] += _normalize_backward(grad, pooled[:, :dim]) if normalize else grad
        grad_tokens = _reduce_backward(grad_pooled, tokens, mask, mode)
        grad_hidden = grad_tokens if cu_seqlens is None else grad_tokens[mask]
        results.append(grad_hidden.to(hidden.dtype).contiguous())
    return results


def check_values(attention_mask: Tensor | None, cu_seqlens: Tensor | None, shape: Sequence[int]) -> None:
    """Raise ValueError for a mask that is not 0/1 or offsets that do not tile the tokens."""
    if attention_mask is not None and not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ValueError("attention_mask must hold only 0 and 1, got other values")
    if cu_seqlens is not None:
        rising = bool((cu_seqlens[1:] >= cu_seqlens[:-1]).all())
        if not rising or cu_seqlens[0] != 0 or cu_seqlens[-1] != shape[0]:
            raise ValueError(f"cu_seqlens must rise from 0 to the {shape[0]} tokens of hidden_states, got {cu_seqlens}")


def _padded(hidden: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens [B, T, D] in the dtype of the computation and their boolean mask [B, T], whichever way they came in."""
    tokens = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if cu_seqlens is None:
        if attention_mask is None:
            return tokens, torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return tokens, attention_mask.bool()
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens[1:].long() - starts
    longest = int(lengths.max()) if len(lengths) else 0
    offsets = torch.arange(longest, device=hidden.device)
    mask = offsets < lengths[:, None]
    return tokens[torch.where(mask, starts[:, None] + offsets, 0)], mask


def _reduce(tokens: Tensor, mask: Tensor, mode: str) -> Tensor:
    """Pooled vectors [B, D]."""
    if tokens.shape[1] == 0:
        return tokens.sum(dim=1)
    if mode == "max":
        largest = torch.where(mask[..., None], tokens, float("-inf")).amax(dim=1)
        return torch.where(mask.any(dim=1, keepdim=True), largest, 0)
    weights, divisor = _weights(mask, mode, tokens.dtype)
    used = torch.where(weights[..., None] > 0, tokens, 0)
    return (used * weights[..., None]).sum(dim=1) / divisor


def _weights(mask: Tensor, mode: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Token weights [B, T] and the divisor [B, 1] of their sum: every mode but max is a weighted sum."""
    length = mask.shape[1]
    positions = torch.arange(length, device=mask.device).expand_as(mask)
    first = positions.masked_fill(~mask, length).amin(dim=1, keepdim=True)
    last = positions.masked_fill(~mask, -1).amax(dim=1, keepdim=True)
    count = mask.sum(dim=1, keepdim=True).clamp(min=1).to(dtype)
    if mode == "mean":
        return mask.to(dtype), count
    if mode == "mean_sqrt_len":
        return mask.to(dtype), count.sqrt()
    if mode == "weightedmean":
        weights = torch.where(mask, positions - first + 1, 0).to(dtype)
        return weights, weights.sum(dim=1, keepdim=True).clamp(min=1)
    chosen = positions == (first if mode == "cls" else last)
    return chosen.to(dtype), torch.ones_like(count)


def _reduce_backward(grad: Tensor, tokens: Tensor, mask: Tensor, mode: str) -> Tensor:
    """Gradient of the tokens [B, T, D] from that of the pooled vectors [B, D]."""
    if tokens.shape[1] == 0:
        return torch.zeros_like(tokens)
    if mode == "max":  # ties: all to the first of the largest tokens, as torch.max does
        winner = torch.where(mask[..., None], tokens, float("-inf")).max(dim=1, keepdim=True).indices
        grad_tokens = torch.zeros_like(tokens).scatter(1, winner, grad[:, None])
        return torch.where(mask[..., None], grad_tokens, 0)
    weights, divisor = _weights(mask, mode, tokens.dtype)
    return torch.where(weights[..., None] > 0, weights[..., None] * (grad / divisor)[:, None], 0)


def _normalize_backward(grad: Tensor, prefix: Tensor) -> Tensor:
    norm = prefix.norm(dim=1, keepdim=True)
    divisor = norm.clamp(min=NORM_EPS)
    unit = prefix / divisor
    along = torch.where(norm > NORM_EPS, (unit * grad).sum(dim=1, keepdim=True), 0)
    return (grad - unit * along) / divisor
