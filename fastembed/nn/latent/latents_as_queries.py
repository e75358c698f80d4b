"""Latents attend to the tokens of each sequence: Set Transformer, SigLIP's head, Perceiver resampler."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ops.latent_attention import has_kernels, latent_attention
from .folding import FoldedQueries
from .layer import Layer

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "first": lambda latents: latents[:, 0],
    "mean_latents": lambda latents: latents.mean(dim=1),
    "flatten": lambda latents: latents.flatten(1),
    "all": lambda latents: latents,
}

# Rows that a matrix product takes in whole blocks of so many round alike, wherever they stand.
_BLOCK_ROWS = 8


def attend(
    layers: Iterable[Layer], latents: Tensor, hidden_states: Tensor, keep: Tensor | None, concat_latents: bool
) -> Tensor:
    """The latents [B, L, D] after every layer, as the parameters say."""
    if keep is None:
        keep = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool)
    x = torch.where(keep[..., None], hidden_states, 0).to(latents.dtype)
    latents = latents.expand(len(x), -1, -1)
    # A row without tokens attends to its padding, zeros, and is overwritten.
    keep = keep | ~keep.any(dim=1, keepdim=True)
    for layer in layers:
        keys, values = layer.keys_values(x)
        kept = keep
        if concat_latents:
            own_keys, own_values = layer.keys_values(layer.norm_q(latents), normed=True)
            keys, values = torch.cat([keys, own_keys], dim=2), torch.cat([values, own_values], dim=2)
            kept = F.pad(keep, (0, latents.shape[1]), value=True)
        latents = layer.feed_forward(layer.attention(latents, keys, values, kept))
    return latents


def attend_folded(
    layer: Layer, latents: Tensor, hidden_states: Tensor, keep: Tensor | None, folded: FoldedQueries
) -> Tensor:
    """The same of the only layer, from the folded weights."""
    if hidden_states.device.type != "cpu" or has_kernels(latents):
        averages = _averages_at_once(hidden_states.to(latents.dtype), keep, folded)
        return layer.feed_forward(_after_folded(layer, latents, averages, folded))
    attended = torch.stack(
        [
            _after_folded(layer, latents, _averages(_aligned(rows.to(latents.dtype)), folded), folded)
            if len(rows)
            else latents.new_zeros(latents.shape)
            for rows in _kept_tokens(hidden_states, keep)
        ]
    )
    return _by_fixed_blocks(layer.feed_forward, attended)


def _averages(rows: Tensor, folded: FoldedQueries) -> Tensor:
    """The averages [H * L, D] of one sequence's tokens [N, D], by itself: no row depends on its batch."""
    rows = _normed(rows, folded)
    return (folded.score_weight @ rows.T).softmax(dim=-1) @ rows


def _averages_at_once(hidden_states: Tensor, keep: Tensor | None, folded: FoldedQueries) -> Tensor:
    """The averages [B, H * L, D] of every sequence's tokens [B, T, D]: these are keys and values."""
    rows = _normed(hidden_states, folded)[:, None]
    queries = folded.score_weight.expand(len(rows), 1, -1, -1)
    return latent_attention(queries, rows, rows, keep, scale=1.0)[:, 0]


def _normed(rows: Tensor, folded: FoldedQueries) -> Tensor:
    return rows if folded.eps is None else F.layer_norm(rows, rows.shape[-1:], eps=folded.eps)


def _after_folded(layer: Layer, latents: Tensor, averages: Tensor, folded: FoldedQueries) -> Tensor:
    """y of the latents [..., L, D] from the averages of the tokens [..., H * L, D]."""
    values = averages.unflatten(-2, (layer.heads, -1)) @ folded.value_weight.transpose(1, 2)
    attended = values.transpose(-3, -2).flatten(-2) + folded.value_bias
    return layer.after_attention(attended, latents, folded.projected)


def _kept_tokens(hidden_states: Tensor, keep: Tensor | None) -> list[Tensor]:
    """The tokens of each sequence [B, T, D] that are kept, as views where they stand side by side."""
    if keep is None:
        return list(hidden_states)
    counts = keep.sum(dim=1)
    firsts = keep.int().argmax(dim=1)
    lasts = keep.shape[1] - 1 - keep.flip(1).int().argmax(dim=1)
    spans = torch.stack([firsts, lasts + 1, counts], dim=1).tolist()
    return [
        row[first:end] if end - first == count else row[kept]
        for row, kept, (first, end, count) in zip(hidden_states, keep, spans, strict=True)
    ]


def _aligned(rows: Tensor) -> Tensor:
    """The same in memory that begins at a cache line, on which too the rounding of a matrix product depends."""
    if torch.compiler.is_compiling() or rows.data_ptr() % 64 == 0:
        return rows
    return rows.clone()


def _by_fixed_blocks(feed_forward: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
    """Of latents [B, L, D], by blocks of as few sequences as have a multiple of 8 rows, filled up at the end.

    How a matrix product rounds a row depends on how many rows it has and on whether the row stands among those that
    fill no block, and a sequence's result must not depend on its batch.
    """
    if torch.is_grad_enabled():
        return feed_forward(latents)
    block = _BLOCK_ROWS // math.gcd(_BLOCK_ROWS, latents.shape[1])
    blocks = [F.pad(part, (0, 0, 0, 0, 0, block - len(part))) for part in latents.split(block)]
    return torch.cat([feed_forward(part) for part in blocks])[: len(latents)]
