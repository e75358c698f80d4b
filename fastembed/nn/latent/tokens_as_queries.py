"""Tokens attend to the latents and are averaged after the feed-forward, as NV-Embed has it.

Both ways, from the parameters and from the folded weights, end in two means over each sequence: of y, the tokens after
attention, and of what the feed-forward's last matrix is given. That matrix is linear, so `past_the_mean` applies it to
the mean, once per sequence.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...ops import latent as ops
from ..linear import QuantLinear
from .folding import FoldedBlock
from .layer import Layer

# Tokens whose activations a training step keeps at a time; the others' are computed again in the backward pass.
TRAINING_TILE = 512
# Output features of the last matrix that are converted to the dtype of the means together.
_OUTPUT_CHUNK = 512


@dataclass(frozen=True)
class Tokens:
    """The tokens that are kept, one sequence after the other."""

    rows: Tensor  # [N, D]
    cu_seqlens: Tensor  # int64 [B + 1]


def means_by_tiles(layer: Layer, tokens: Tokens, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None]:
    """The means as the parameters say; a tile's activations are computed again in the backward."""
    low = layer.to_q.weight.dtype
    accumulate = torch.promote_types(low, torch.float32)
    lengths = tokens.cu_seqlens.diff()
    sequence = torch.repeat_interleave(lengths, output_size=len(tokens.rows))

    def sums(rows: Tensor, of: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        y = layer.attention(rows, keys, values)
        parts = (y,) if layer.ffn is None else (y, layer.gated(y))
        zeros = [part.new_zeros(len(lengths), part.shape[1], dtype=accumulate) for part in parts]
        return tuple(zero.index_add(0, of, part.to(accumulate)) for zero, part in zip(zeros, parts, strict=True))

    totals: tuple[Tensor, ...] = ()
    rows = tokens.rows.to(low)
    for first in range(0, max(1, len(rows)), TRAINING_TILE):
        arguments = (rows[first : first + TRAINING_TILE], sequence[first : first + TRAINING_TILE], keys, values)
        part = checkpoint(sums, *arguments, use_reentrant=False) if torch.is_grad_enabled() else sums(*arguments)
        totals = part if not totals else tuple(a + b for a, b in zip(totals, part, strict=True))
    means = [total / lengths.clamp(min=1)[:, None] for total in totals]
    return means[0], means[1] if len(means) > 1 else None


def means_folded(tokens: Tokens, folded: FoldedBlock) -> tuple[Tensor, Tensor]:
    """The means from the folded weights."""
    if isinstance(folded.hidden_weight, list):
        return _means_quantized(tokens, folded, folded.hidden_weight)
    return ops.latent_pool(
        tokens.rows,
        tokens.cu_seqlens,
        folded.score_weight,
        folded.score_bias,
        folded.value_weight,
        folded.hidden_weight,
        folded.hidden_bias,
        heads=folded.heads,
        eps=folded.eps,
    )


def _means_quantized(tokens: Tokens, folded: FoldedBlock, chunks: list[QuantLinear]) -> tuple[Tensor, Tensor]:
    """As `latent_pool`, with the first matrix of the feed-forward in QuantLinear layers of values and gates."""
    rows = tokens.rows
    if rows.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        rows = rows.float()
    tiles = ops.Tiles(
        rows,
        tokens.cu_seqlens,
        folded.score_weight,
        folded.score_bias,
        folded.value_weight,
        folded.heads,
        folded.eps,
    )
    hidden = sum(chunk.out_features for chunk in chunks) // 2
    sums = rows.new_zeros(len(tokens.cu_seqlens) - 1, hidden, dtype=torch.float64)
    for first, normalized in tiles:
        column = 0
        for chunk in chunks:
            values, gates = chunk(normalized).chunk(2, dim=1)
            columns = values.shape[1]
            ops.gate(values, gates, first, tiles.offsets, sums[:, column : column + columns])
            column += columns
    sums += tiles.y_sums.sum(dim=1, keepdim=True) * 0  # a sequence that is NaN in y is so here
    return tiles.means(tiles.y_sums), tiles.means(sums)


def past_the_mean(last: nn.Module, y: Tensor, gated: Tensor | None) -> Tensor:
    """The mean of z, in the dtype of the means: the feed-forward's last matrix, if there is one, and the residual."""
    if gated is None or not isinstance(last, nn.Linear):
        return y if gated is None else y + gated
    weight, bias = last.weight, last.bias
    if weight.dtype != gated.dtype:
        # A piece at a time: the whole matrix in float32 would be the largest thing in memory.
        pieces = [_matrix_vector(part.to(gated.dtype), gated) for part in weight.split(_OUTPUT_CHUNK)]
        product = torch.cat(pieces, dim=1)
    else:
        product = _matrix_vector(weight, gated)
    return y + product if bias is None else y + product + bias


def _matrix_vector(weight: Tensor, rows: Tensor) -> Tensor:
    """rows [B, in] times weight [out, in]: each row by itself, so that it does not depend on the others."""
    if torch.is_grad_enabled() or not len(rows):
        return rows @ weight.T
    return torch.stack([weight @ row for row in rows])
