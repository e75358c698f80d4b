"""Latent-attention pooling in plain PyTorch: NV-Embed's computation as released, and the same folded for inference.

As released (NV-Embed, arXiv 2405.17428; where the paper and the released code differ, the code) every token attends to
L trained latents over H heads, and the tokens are averaged after a feed-forward with a GELU gate:

    y = x + W_o concat_h softmax(LN(x) W_q^h (c W_k^h)^T / sqrt(d_h)) c W_v^h,   c = LN(latents)
    z = y + W_2 (a * gelu(gate)) + b_2,   [a, gate] = W_1 LN(y) + b_1
    e = mean of z over the tokens kept,   optionally e / |e|

Latents, W_q, W_k, W_v and W_o meet no data in between, so they fold into one matrix of scores and one of values; the
affine parts and the centring of the LayerNorms fold into the weights that follow them; and W_2, linear and followed by
the mean alone, moves past it. What is left per token is `latent_pool`.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

PANEL = 32


def nv_embed_pooling(
    hidden_states: Tensor, mask: Tensor | None, weights: Mapping[str, Tensor], heads: int = 8, normalize: bool = True
) -> Tensor:
    """The computation as released, with the released tensor names; [B, D], or [B, T, D] where the mask is None."""
    block = "cross_attend_blocks.0"
    dim = hidden_states.shape[-1]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (dim,), weights[name + ".weight"], weights[name + ".bias"])

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    latents = weights["latents"].expand(len(hidden_states), -1, -1)
    query = F.linear(norm(hidden_states, f"{block}.norm"), weights[f"{block}.fn.to_q.weight"])
    context = F.linear(norm(latents, f"{block}.norm_context"), weights[f"{block}.fn.to_kv.weight"])
    key, value = context.chunk(2, dim=-1)
    attended = F.scaled_dot_product_attention(split(query), split(key), split(value)).transpose(1, 2).flatten(2)
    y = F.linear(attended, weights[f"{block}.fn.to_out.weight"]) + hidden_states
    block = "cross_attend_blocks.1"
    hidden = F.linear(norm(y, f"{block}.norm"), weights[f"{block}.fn.net.0.weight"], weights[f"{block}.fn.net.0.bias"])
    values, gates = hidden.chunk(2, dim=-1)
    z = F.linear(values * F.gelu(gates), weights[f"{block}.fn.net.2.weight"], weights[f"{block}.fn.net.2.bias"]) + y
    if mask is None:
        return z
    pooled = (z * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    return F.normalize(pooled, dim=-1) if normalize else pooled


def fold_scores(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """The product of one head's projections: queries [d_h, D], keys [L, d_h] to a weight of scores [L, D]."""
    return (keys @ queries) * scale


def fold_norm(weight: Tensor, bias: Tensor | None, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias after a LayerNorm, with its affine part and its centring folded in.

    The rows of the new weight [out, D] sum to zero, so that it takes x / std as well as (x - mean) / std.
    """
    new_bias = weight @ shift if bias is None else weight @ shift + bias
    scaled = weight * gain
    return scaled - scaled.mean(dim=1, keepdim=True), new_bias


def to_panels(weight: Tensor, gated: bool = False) -> Tensor:
    """[out_features, in_features] as the CPU kernels read it, zero-padded.

    float32: [panels, in_features, 32]; bfloat16: [panels, ceil(in_features / 2), 32, 2]. A panel holds 32 consecutive
    rows, or, `gated`, 16 rows of the first half of out_features and the same 16 of the second.
    """
    rows, features = weight.shape
    if gated:
        halves = [F.pad(half, (0, 0, 0, -len(half) % (PANEL // 2))) for half in weight.chunk(2)]
        panels = torch.stack([half.unflatten(0, (-1, PANEL // 2)) for half in halves], dim=1).flatten(1, 2)
    else:
        panels = F.pad(weight, (0, 0, 0, -rows % PANEL)).unflatten(0, (-1, PANEL))
    if weight.dtype != torch.bfloat16:
        return panels.transpose(1, 2).contiguous()
    return F.pad(panels, (0, features % 2)).unflatten(2, (-1, 2)).transpose(1, 2).contiguous()


def from_panels(panels: Tensor, out_features: int, in_features: int, gated: bool = False) -> Tensor:
    """The weight [out_features, in_features] that `to_panels` packed."""
    rows = panels.transpose(1, 2)
    if panels.dim() == 4:
        rows = rows.flatten(2)
    if not gated:
        return rows.flatten(0, 1)[:out_features, :in_features]
    halves = rows.unflatten(1, (2, -1)).transpose(0, 1).flatten(1, 2)
    return halves[:, : out_features // 2, :in_features].flatten(0, 1)


def attention(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale * query key^T) value over the kept keys; see `fastembed.ops.latent_attention.latent_attention`.

    Returns the result [B, H, S, d_v] in the dtype of query, and the logarithm of the softmax's sum [B, H, S], float32
    or better; infinity, and a result of zeros, without a key.
    """
    key, value, scores = _scores(query, key, value, keep, scale)
    lse = scores.to(torch.promote_types(query.dtype, torch.float32)).logsumexp(dim=-1)
    empty = lse == -math.inf
    weights = scores.masked_fill(empty[..., None], 0).softmax(dim=-1)
    return (weights @ value).masked_fill(empty[..., None], 0), lse.masked_fill(empty, math.inf)


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
    """The gradients of query, key and value from that of the result; `out` and `lse` are what `attention` returned."""
    key, value, scores = _scores(query, key, value, keep, scale)
    weights = (scores - lse[..., None]).exp().to(query.dtype)
    slopes = weights * (grad @ value.mT - (grad * out).sum(dim=-1, keepdim=True))
    gradients = scale * (slopes @ key), scale * (slopes.mT @ query), weights.mT @ grad
    return gradients[0].contiguous(), gradients[1].contiguous(), gradients[2].contiguous()


def _scores(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values with zeros where they are not kept, and the scores, -inf there."""
    if keep is None:
        return key, value, scale * (query @ key.mT)
    key, value = (torch.where(keep[:, None, :, None], x, 0) for x in (key, value))
    return key, value, torch.where(keep[:, None, None], scale * (query @ key.mT), -math.inf)


def latent_pool(
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
    """The folded block up to the means; see `fastembed.ops.latent.latent_pool`."""
    dim = x.shape[1]
    if score_weight.dim() > 2:
        score_weight = from_panels(score_weight, len(score_bias), dim)
        value_weight = from_panels(value_weight, dim, len(score_bias))
        hidden_weight = from_panels(hidden_weight, len(hidden_bias), dim, gated=True)
    accumulate = torch.promote_types(x.dtype, torch.float32)
    low = score_weight.dtype

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        return rows.to(low).to(accumulate) @ weight.to(accumulate).T

    x = x.to(accumulate)
    scores = product(F.layer_norm(x, (dim,), eps=eps), score_weight) + score_bias
    weights = scores.unflatten(1, (heads, -1)).softmax(dim=-1).flatten(1)
    y = x + product(weights, value_weight)
    hidden = product(F.layer_norm(y, (dim,), eps=eps), hidden_weight) + hidden_bias
    values, gates = hidden.chunk(2, dim=-1)
    poison = torch.where(x.isfinite().all(dim=1), 0.0, math.nan).to(accumulate)[:, None]
    return _means(y + poison, cu_seqlens), _means(values * F.gelu(gates) + poison, cu_seqlens)


def _means(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    lengths = cu_seqlens.diff()
    sequence = torch.repeat_interleave(lengths, output_size=len(rows))
    sums = rows.new_zeros(len(lengths), rows.shape[1]).index_add_(0, sequence, rows)
    return sums / lengths.clamp(min=1)[:, None]
