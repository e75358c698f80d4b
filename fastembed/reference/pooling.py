"""Multi-exit pooling in plain PyTorch.

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
        tokens, mask = _padded(hidden, attention_mask, cu_seqlens)
        pooled = _reduce(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), mask, mode)
        for dim in exit_dims:
            prefix = pooled[:, :dim]
            if normalize:
                prefix = prefix / prefix.norm(dim=1, keepdim=True).clamp(min=NORM_EPS)
            outputs.append(prefix.to(out_dtype))
    return outputs


def check_values(attention_mask: Tensor | None, cu_seqlens: Tensor | None, shape: Sequence[int]) -> None:
    """Raise ValueError for a mask that is not 0/1 or offsets that do not tile the tokens."""
    if attention_mask is not None and not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ValueError("attention_mask must hold only 0 and 1, got other values")
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != shape[0] or any(a > b for a, b in zip(offsets, offsets[1:], strict=False)):
            raise ValueError(f"cu_seqlens must rise from 0 to the {shape[0]} tokens of hidden_states, got {offsets}")


def _padded(hidden: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens [B, T, D] and their boolean mask [B, T], whichever way they came in."""
    if cu_seqlens is None:
        if attention_mask is None:
            return hidden, torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return hidden, attention_mask.bool()
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens[1:].long() - starts
    longest = int(lengths.max()) if len(lengths) else 0
    offsets = torch.arange(longest, device=hidden.device)
    mask = offsets < lengths[:, None]
    return hidden[torch.where(mask, starts[:, None] + offsets, 0)], mask


def _reduce(tokens: Tensor, mask: Tensor, mode: str) -> Tensor:
    batch, length, _ = tokens.shape
    if length == 0:
        return tokens.sum(dim=1)
    count = mask.sum(dim=1, keepdim=True)
    positions = torch.arange(length, device=tokens.device).expand(batch, length)
    first = positions.masked_fill(~mask, length).amin(dim=1, keepdim=True)
    last = positions.masked_fill(~mask, -1).amax(dim=1, keepdim=True)
    valid = torch.where(mask[..., None], tokens, 0)
    if mode in ("cls", "lasttoken"):
        index = (first if mode == "cls" else last).clamp(0, length - 1)
        return valid.gather(1, index[..., None].expand(batch, 1, tokens.shape[2])).squeeze(1)
    if mode == "max":
        largest = torch.where(mask[..., None], tokens, float("-inf")).amax(dim=1)
        return torch.where(count > 0, largest, 0)
    if mode == "weightedmean":
        weights = torch.where(mask, positions - first + 1, 0).to(tokens.dtype)
        return (valid * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True).clamp(min=1)
    divisor = count.clamp(min=1).to(tokens.dtype)
    return valid.sum(dim=1) / (divisor.sqrt() if mode == "mean_sqrt_len" else divisor)
