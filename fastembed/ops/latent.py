"""Latent-attention pooling, folded for inference: checks, schema, fake kernel and backend choice."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._native import core, num_threads
from ..reference import latent as reference
from . import _latent_cuda
from ._dtypes import DTYPE_CODES
from ._registry import Op
from .pooling import pool_exits

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16)

# Tokens that go through the block together. The activations of a tile stay in the last-level cache while the weights
# stream by; fewer tokens would read the weights too often for what they compute. A multiple of every level's tile.
TILE_TOKENS = 336
# Hidden activations of all tokens that are in a GPU's memory at a time, and the fewest hidden features in one product.
_HIDDEN_ELEMENTS = 2**25
_LEAST_HIDDEN = 512


def latent_pool(
    x: Tensor,
    cu_seqlens: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    value_weight: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    *,
    heads: int,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Attention of tokens to latents and the gated feed-forward's first half, averaged over each sequence.

    With LN without affine parts, per token: y = x + softmax_per_head(LN(x) score_weight^T + score_bias) value_weight^T
    and g = a * gelu(gate), [a, gate] = LN(y) hidden_weight^T + hidden_bias. The scores are never in memory for more
    than a tile of tokens, and neither are a, gate and g.

    Args:
        x: [N, D] in float32, bfloat16, float16 or float64, the tokens of all sequences one after the other.
        cu_seqlens: int64 [B + 1], rising from 0 to N. An empty sequence gives zeros.
        score_weight: [H * L, D], head by head.
        score_bias: [H * L].
        value_weight: [D, H * L].
        hidden_weight: [2 * F, D], the F values and then the F gates.
        hidden_bias: [2 * F].
        heads: H.
        eps: of both LayerNorms.

    The three weights share a dtype, float32, bfloat16 or (reference only) float64; what they are multiplied by is
    rounded to it, and sums are in float32. Biases are float32 (float64 with float64). All three may instead be in the
    CPU kernels' panels (see `pack_weight`); plain weights are packed at every call there.

    Returns:
        The means over each sequence of y [B, D] and of g [B, F], float32 (float64 for a float64 x). Both are NaN for a
        sequence with a NaN or infinite token; the others are not affected.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    return _latent_pool(x, cu_seqlens, score_weight, score_bias, value_weight, hidden_weight, hidden_bias, heads, eps)


def pack_weight(weight: Tensor, gated: bool = False) -> Tensor:
    """A float32 or bfloat16 weight [out_features, in_features] in panels, as `fastembed.reference.latent` lays out."""
    if weight.device.type != "cpu":
        return reference.to_panels(weight, gated)
    rows, features = weight.shape
    packed = weight.new_empty(_panel_shape(rows, features, weight.dtype, gated))
    source = weight.float().contiguous()
    core.latent_to_panels(
        source.data_ptr(), rows, features, gated, DTYPE_CODES[weight.dtype], packed.data_ptr(), num_threads()
    )
    return packed


def _panel_shape(rows: int, features: int, dtype: torch.dtype, gated: bool) -> tuple[int, ...]:
    panels = -(-(rows // 2) // (reference.PANEL // 2)) if gated else -(-rows // reference.PANEL)
    if dtype == torch.bfloat16:
        return panels, -(-features // 2), reference.PANEL, 2
    return panels, features, reference.PANEL


def gate(values: Tensor, gates: Tensor, first: int, offsets: Tensor, sums: Tensor) -> None:
    """Add values * gelu(gates) of the tokens [first, first + rows) to the float64 sums of their sequences, in place.

    values and gates: float32 [rows, columns] with equal strides; sums: [B, columns], a slice of wider ones perhaps.
    """
    rows, columns = values.shape
    core.latent_gate(
        values.data_ptr(),
        gates.data_ptr(),
        values.stride(0),
        first,
        rows,
        columns,
        offsets.data_ptr(),
        sums.data_ptr(),
        sums.stride(0),
        num_threads(),
    )


class Tiles:
    """A call of the CPU kernels, tile by tile: the attention here, the feed-forward by whoever holds its weight."""

    def __init__(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        score_panels: Tensor,
        score_bias: Tensor,
        value_panels: Tensor,
        heads: int,
        eps: float,
    ) -> None:
        if x.device.type != "cpu":
            raise ValueError(f"hidden_states must be on the cpu, where an 8-bit feed-forward runs, got {x.device}")
        self.x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
        self.offsets = cu_seqlens.contiguous()
        self.scores, self.score_bias, self.values = score_panels, score_bias.contiguous(), value_panels
        self.heads, self.eps = heads, eps
        self.y_sums = x.new_zeros(len(cu_seqlens) - 1, x.shape[1], dtype=torch.float64)
        self._normalized = x.new_empty(min(TILE_TOKENS, len(x)), x.shape[1], dtype=torch.float32)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """(first token, normalised y [rows, D]) of each tile; the rows are overwritten by the next."""
        tokens, dim = self.x.shape
        for first in range(0, tokens, TILE_TOKENS):
            rows = min(TILE_TOKENS, tokens - first)
            core.latent_attend(
                self.x.data_ptr() + first * self.x.stride(0) * self.x.element_size(),
                DTYPE_CODES[self.x.dtype],
                self.x.stride(0),
                first,
                rows,
                dim,
                self.offsets.data_ptr(),
                self.scores.data_ptr(),
                self.score_bias.data_ptr(),
                self.values.data_ptr(),
                DTYPE_CODES[self.scores.dtype],
                len(self.score_bias),
                self.heads,
                self.eps,
                self._normalized.data_ptr(),
                self.y_sums.data_ptr(),
                num_threads(),
            )
            yield first, self._normalized[:rows]

    def means(self, sums: Tensor) -> Tensor:
        """float64 sums over each sequence to float32 means; zeros where there was no token."""
        return (sums / self.offsets.diff().clamp(min=1)[:, None]).float()


def _check(
    x: Tensor,
    cu_seqlens: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    value_weight: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    heads: int,
    eps: float,
) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must have shape [tokens, dim], got {list(x.shape)}")
    if x.dtype not in (*DTYPE_CODES, torch.float64):
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if cu_seqlens.dtype != torch.int64 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"cu_seqlens must be int64 [sequences + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    dim, scores, hidden = x.shape[1], score_bias.numel(), hidden_bias.numel()
    if heads < 1 or scores % heads:
        raise ValueError(f"heads must divide the {scores} elements of score_bias, got {heads}")
    if hidden % 2:
        raise ValueError(f"hidden_bias must have an even number of elements, got {hidden}")
    dtype, packed = score_weight.dtype, score_weight.dim() > 2
    if dtype not in (*_WEIGHT_DTYPES, torch.float64) or (packed and dtype == torch.float64):
        raise TypeError(f"score_weight must be float32 or bfloat16 (or float64, not in panels), got {dtype}")
    for name, weight, rows, features in (
        ("score_weight", score_weight, scores, dim),
        ("value_weight", value_weight, dim, scores),
        ("hidden_weight", hidden_weight, hidden, dim),
    ):
        gated = name == "hidden_weight"
        shape = _panel_shape(rows, features, dtype, gated) if packed else (rows, features)
        if weight.dtype != dtype or weight.shape != shape:
            raise ValueError(f"{name} must be {dtype} {list(shape)}, got {weight.dtype} {list(weight.shape)}")
    for name, tensor in (
        ("cu_seqlens", cu_seqlens),
        ("score_weight", score_weight),
        ("score_bias", score_bias),
        ("value_weight", value_weight),
        ("hidden_weight", hidden_weight),
        ("hidden_bias", hidden_bias),
    ):
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, where x is, got {tensor.device}")
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    for name, bias in (("score_bias", score_bias), ("hidden_bias", hidden_bias)):
        if bias.dtype != accumulate or bias.dim() != 1:
            raise ValueError(f"{name} must be one-dimensional {accumulate}, got {bias.dtype} {list(bias.shape)}")


def _check_offsets(cu_seqlens: Tensor, tokens: int) -> None:
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != tokens or any(a > b for a, b in itertools.pairwise(ends)):
        raise ValueError(f"cu_seqlens must rise from 0 to the {tokens} tokens of x, got {ends}")


def _reference(x: Tensor, cu_seqlens: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    _check(x, cu_seqlens, *args)
    _check_offsets(cu_seqlens, len(x))
    return reference.latent_pool(x, cu_seqlens, *args)


def _cpu(
    x: Tensor,
    cu_seqlens: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    value_weight: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    args = (score_weight, score_bias, value_weight, hidden_weight, hidden_bias, heads, eps)
    _check(x, cu_seqlens, *args)
    _check_offsets(cu_seqlens, len(x))
    if score_weight.dtype == torch.float64:
        return reference.latent_pool(x, cu_seqlens, *args)
    if score_weight.dim() == 2:
        score_weight, value_weight = pack_weight(score_weight), pack_weight(value_weight)
        hidden_weight = pack_weight(hidden_weight, gated=True)
    score_weight, value_weight, hidden_weight = (w.contiguous() for w in (score_weight, value_weight, hidden_weight))
    hidden_bias = hidden_bias.contiguous()
    tiles = Tiles(x, cu_seqlens, score_weight, score_bias, value_weight, heads, eps)
    hidden = len(hidden_bias) // 2
    gated_sums = x.new_zeros(len(cu_seqlens) - 1, hidden, dtype=torch.float64)
    for first, normalized in tiles:
        core.latent_feed_forward(
            normalized.data_ptr(),
            first,
            len(normalized),
            x.shape[1],
            tiles.offsets.data_ptr(),
            hidden_weight.data_ptr(),
            DTYPE_CODES[hidden_weight.dtype],
            hidden_bias.data_ptr(),
            hidden,
            gated_sums.data_ptr(),
            num_threads(),
        )
    gated_sums += tiles.y_sums.sum(dim=1, keepdim=True) * 0  # a sequence that is NaN in y is so here
    return tiles.means(tiles.y_sums), tiles.means(gated_sums)


def _cuda(x: Tensor, cu_seqlens: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _on_gpu(_latent_cuda, x, cu_seqlens, *args)


def _triton(x: Tensor, cu_seqlens: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    from ..triton_kernels import latent

    return _on_gpu(latent, x, cu_seqlens, *args)


def _on_gpu(
    kernels: Any,
    x: Tensor,
    cu_seqlens: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    value_weight: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Attention, gates and means by `kernels`, the feed-forward's product by PyTorch, some hidden features at a time.

    The values of `cu_seqlens` are not checked, which would wait for the GPU; the kernels clamp them.
    """
    args = (score_weight, score_bias, value_weight, hidden_weight, hidden_bias, heads, eps)
    _check(x, cu_seqlens, *args)
    low, dim, hidden = score_weight.dtype, x.shape[1], len(hidden_bias) // 2
    if low == torch.float64:
        return reference.latent_pool(x, cu_seqlens, *args)
    if score_weight.dim() > 2:
        score_weight = reference.from_panels(score_weight, len(score_bias), dim)
        value_weight = reference.from_panels(value_weight, dim, len(score_bias))
        hidden_weight = reference.from_panels(hidden_weight, 2 * hidden, dim, gated=True)
    x = x.float()
    by_head = (heads, len(score_bias) // heads)
    y = x + kernels.attend_folded(
        F.layer_norm(x, (dim,), eps=eps).to(low),
        score_weight.unflatten(0, by_head),
        score_bias.view(by_head),
        value_weight.T.unflatten(0, by_head),
    )
    normalized = F.layer_norm(y, (dim,), eps=eps).to(low)
    columns = max(_LEAST_HIDDEN, _HIDDEN_ELEMENTS // max(1, len(x)))
    gated = []
    for first in range(0, hidden, columns):
        values = slice(first, min(first + columns, hidden))
        gates = slice(hidden + first, hidden + values.stop)
        products = (normalized @ hidden_weight[part].T for part in (values, gates))
        gated.append(kernels.gated_means(*products, hidden_bias[values], hidden_bias[gates], cu_seqlens))
    means = pool_exits([y], cu_seqlens=cu_seqlens, normalize=False, dims=[dim])[0][dim]
    return means, torch.cat(gated, dim=1)


def _fake(x: Tensor, cu_seqlens: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    _check(x, cu_seqlens, *args)
    dtype = torch.promote_types(x.dtype, torch.float32)
    sequences, hidden = cu_seqlens.shape[0] - 1, args[4].shape[0] // 2
    return x.new_empty(sequences, x.shape[1], dtype=dtype), x.new_empty(sequences, hidden, dtype=dtype)


_latent_pool = Op(
    "latent_pool(Tensor x, Tensor cu_seqlens, Tensor score_weight, Tensor score_bias, Tensor value_weight, "
    "Tensor hidden_weight, Tensor hidden_bias, int heads, float eps) -> (Tensor, Tensor)",
    implementations={"cpu": _cpu, "cuda": _cuda, "triton": _triton, "reference": _reference},
    fake=_fake,
    accepts={backend: frozenset(DTYPE_CODES) for backend in ("cpu", "cuda", "triton")},
)
