"""Multi-exit pooling in plain PyTorch, forward and backward.

    p      = reduce over the valid tokens t of h_e[b, t]        in float32 (float64 stays float64)
    y_k    = p[:k] / max(||p[:k]||_2, 1e-12)                     for every requested prefix k, or
             round(127 p[:k] / max |p[:k]|)                      as int8, or
             p[:k] > 0                                           as packed bits (uint8)

A sequence without valid tokens gives zeros, and what stands in padding never matters, NaN included.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .search import pack_bits

NORM_EPS = 1e-12


def pool_exits(
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    mode: str,
    dims: Sequence[Sequence[int]],
    normalize: bool,
    out_dtype: torch.dtype,
    keep_state: bool = False,
) -> list[Tensor]:
    """Pool every exit; see `fastembed.pool_exits`.

    Returns [B, dim] tensors (bits: [B, ceil(dim / 8)]), exit by exit, dims in the order given; with `keep_state` also
    what the backward needs: for every exit the pooled vectors [B, largest dim] in the dtype of the computation, and
    then, for "max", for every exit the token int32 [B, largest dim] that each value is of, -1 without tokens.
    """
    check_values(attention_mask, cu_seqlens, hidden_states[0].shape)
    outputs, pooled_vectors, winner_tensors = [], [], []
    for hidden, exit_dims in zip(hidden_states, dims, strict=True):
        tokens, mask = _padded(hidden[..., : max(exit_dims)], attention_mask, cu_seqlens)
        pooled = _reduce(tokens, mask, mode)
        outputs += write_prefixes(pooled, exit_dims, normalize, out_dtype)
        if keep_state:
            pooled_vectors.append(pooled.contiguous())
            winner_tensors += [_winners(tokens, mask, pooled)] if mode == "max" else []
    return [*outputs, *pooled_vectors, *winner_tensors]


def pool_modes(
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    modes: Sequence[str],
    dims: Sequence[Sequence[int]],
    normalize: bool,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    """As `pool_exits`, of several modes whose vectors stand side by side, [B, len(modes) * D], before truncation."""
    check_values(attention_mask, cu_seqlens, hidden_states[0].shape)
    outputs = []
    for hidden, exit_dims in zip(hidden_states, dims, strict=True):
        tokens, mask = _padded(hidden, attention_mask, cu_seqlens)
        pooled = torch.cat([_reduce(tokens, mask, mode) for mode in modes], dim=1)
        outputs += write_prefixes(pooled, exit_dims, normalize, out_dtype)
    return outputs


def write_prefixes(pooled: Tensor, dims: Sequence[int], normalize: bool, out_dtype: torch.dtype) -> list[Tensor]:
    """Prefixes of the pooled vectors [B, D], normalised, in the dtype asked for."""
    outputs = []
    for dim in dims:
        prefix = pooled[:, :dim]
        if out_dtype == torch.int8:
            outputs.append(to_int8(prefix))
        elif out_dtype == torch.uint8:
            outputs.append(pack_bits(prefix))
        else:
            if normalize:
                prefix = prefix / prefix.norm(dim=1, keepdim=True).clamp(min=NORM_EPS)
            outputs.append(prefix.to(out_dtype, copy=True, memory_format=torch.contiguous_format))
    return outputs


def to_int8(vectors: Tensor) -> Tensor:
    """Each vector [B, D] times 127 over its largest magnitude; zeros where that is zero or not finite."""
    largest = vectors.abs().amax(dim=1, keepdim=True)
    usable = (largest > 0) & largest.isfinite()
    codes = (vectors / torch.where(usable, largest, 1) * 127).round()
    return torch.where(usable, codes, 0).to(torch.int8)


def pool_exits_backward(
    state: Sequence[Tensor],
    grads: Sequence[Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    tokens: int,
    sizes: Sequence[int],
    dtype: torch.dtype,
    mode: str,
    dims: Sequence[Sequence[int]],
    normalize: bool,
) -> list[Tensor]:
    """Gradients of the hidden states, [B, tokens, size] or packed [tokens, size], from those of the outputs.

    Args:
        state: what `pool_exits` kept.
        grads: of the outputs.
        tokens, sizes, dtype: of the hidden states, one size per exit.
    """
    sequences = len(state[0])
    mask = token_mask(attention_mask, cu_seqlens, sequences, tokens, state[0].device)
    pooled_vectors, winner_tensors = state[: len(dims)], state[len(dims) :]
    remaining = iter(grads)
    results = []
    for exit, (pooled, exit_dims, size) in enumerate(zip(pooled_vectors, dims, sizes, strict=True)):
        grad_pooled = torch.zeros_like(pooled)
        for dim in exit_dims:
            grad = next(remaining).to(pooled.dtype)
            grad_pooled[:, :dim] += _normalize_backward(grad, pooled[:, :dim]) if normalize else grad
        winner = winner_tensors[exit] if mode == "max" else None
        grad_tokens = _reduce_backward(grad_pooled, mask, mode, winner)
        grad_tokens = torch.nn.functional.pad(grad_tokens, (0, size - grad_pooled.shape[1]))
        if cu_seqlens is not None:
            grad_tokens = grad_tokens[token_mask(None, cu_seqlens, sequences, tokens, mask.device)]
        results.append(grad_tokens.to(dtype).contiguous())
    return results


def check_values(attention_mask: Tensor | None, cu_seqlens: Tensor | None, shape: Sequence[int]) -> None:
    """Raise ValueError for a mask that is not 0/1 or offsets that do not tile the tokens."""
    if attention_mask is not None and not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ValueError("attention_mask must hold only 0 and 1, got other values")
    if cu_seqlens is not None:
        rising = bool((cu_seqlens[1:] >= cu_seqlens[:-1]).all())
        if not rising or cu_seqlens[0] != 0 or cu_seqlens[-1] != shape[0]:
            raise ValueError(f"cu_seqlens must rise from 0 to the {shape[0]} tokens of hidden_states, got {cu_seqlens}")


def token_mask(
    attention_mask: Tensor | None, cu_seqlens: Tensor | None, sequences: int, tokens: int, device: torch.device
) -> Tensor:
    """Which tokens are valid, bool [B, T], whichever way they came in; packed ones as if padded on the right."""
    if cu_seqlens is None:
        if attention_mask is None:
            return torch.ones(sequences, tokens, dtype=torch.bool, device=device)
        return attention_mask.bool()
    positions, inside = _unpacked(cu_seqlens)
    return inside if attention_mask is None else inside & attention_mask.bool()[positions]


def _unpacked(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The packed position of every token of a padded batch [B, T], and where there is one."""
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens[1:].long() - starts
    longest = int(lengths.max()) if len(lengths) else 0
    offsets = torch.arange(longest, device=cu_seqlens.device)
    inside = offsets < lengths[:, None]
    return torch.where(inside, starts[:, None] + offsets, 0), inside


def _padded(hidden: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens [B, T, D] in the dtype of the computation and their boolean mask [B, T], whichever way they came in."""
    tokens = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if cu_seqlens is None:
        return tokens, token_mask(attention_mask, None, hidden.shape[0], hidden.shape[1], hidden.device)
    mask = token_mask(attention_mask, cu_seqlens, len(cu_seqlens) - 1, len(hidden), hidden.device)
    return tokens[_unpacked(cu_seqlens)[0]], mask


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


def _winners(tokens: Tensor, mask: Tensor, largest: Tensor) -> Tensor:
    """The first valid token that has the largest value (NaN, if that is NaN), per column; -1 without tokens."""
    if tokens.shape[1] == 0:
        return torch.full_like(largest, -1, dtype=torch.int32)
    is_largest = (tokens == largest[:, None]) | (tokens.isnan() & largest[:, None].isnan())
    winner = (is_largest & mask[..., None]).to(torch.int32).argmax(dim=1).to(torch.int32)
    return torch.where(mask.any(dim=1, keepdim=True), winner, -1)


def _reduce_backward(grad: Tensor, mask: Tensor, mode: str, winner: Tensor | None) -> Tensor:
    """Gradient of the tokens [B, T, D] from that of the pooled vectors [B, D]."""
    if mask.shape[1] == 0:
        return grad.new_zeros(len(grad), 0, grad.shape[1])
    if winner is not None:
        positions = torch.arange(mask.shape[1], device=mask.device)[:, None]
        return torch.where(positions == winner[:, None], grad[:, None], 0)
    weights, divisor = _weights(mask, mode, grad.dtype)
    return torch.where(weights[..., None] > 0, weights[..., None] * (grad / divisor)[:, None], 0)


def _normalize_backward(grad: Tensor, prefix: Tensor) -> Tensor:
    norm = prefix.norm(dim=1, keepdim=True)
    divisor = norm.clamp(min=NORM_EPS)
    unit = prefix / divisor
    along = torch.where(norm > NORM_EPS, (unit * grad).sum(dim=1, keepdim=True), 0)
    return (grad - unit * along) / divisor
