"""How much a layer has to compute, and so whether folding it pays. Matrix products only."""

from torch import nn

from .layer import Layer


def tokens_fold(layer: Layer, latents: int) -> bool:
    """Whether a layer with tokens as queries can be folded, for a mean, and is then less work for its sizes.

    Per token and head, projections of 2 D d_h and attention of 2 L d_h become scores and values of 2 D L.
    """
    dim, head_dim = layer.to_q.in_features, layer.to_q.out_features // layer.heads
    return (
        layer.ffn == "geglu"
        and layer.residual == "q_in"
        and isinstance(layer.to_out, nn.Linear)
        and layer.to_out.bias is None
        and isinstance(layer.norm_q, nn.LayerNorm)
        and isinstance(layer.norm_ffn, nn.LayerNorm)
        and head_dim * (dim + latents) > dim * latents
    )


def latents_fold(layer: Layer, latents: int) -> bool:
    """Whether folding is less work with latents as queries.

    Per token and head, keys and values of 2 D d_h and attention of 2 L d_h become scores and averages of 2 D L.
    """
    return latents < layer.to_q.out_features // layer.heads


def operations_of_tokens(layer: Layer, latents: int, tokens: int, sequences: int, folds: bool) -> dict[str, int]:
    """Multiplications of tokens as queries: see LatentAttentionPooling.arithmetic."""
    dim, inner = layer.to_q.in_features, layer.to_q.out_features
    first, last = _feed_forward(layer)
    cached = tokens * (2 * dim * inner + 2 * latents * inner + first + last)
    left = cached - (tokens - sequences) * last
    folded = tokens * (2 * dim * layer.heads * latents + first) + sequences * last
    return {
        "released": cached + sequences * 2 * latents * dim * inner,
        "cached": cached,
        "folded": folded if folds else left,
    }


def operations_of_latents(
    layer: Layer, depth: int, latents: int, tokens: int, sequences: int, folds: bool
) -> dict[str, int]:
    """Multiplications of latents as queries: see LatentAttentionPooling.arithmetic."""
    dim, inner = layer.to_q.in_features, layer.to_q.out_features
    queries, per_sequence = latents * dim * inner, latents * (sum(_feed_forward(layer)) + dim * inner)
    released = depth * (tokens * (2 * dim * inner + 2 * latents * inner) + sequences * (per_sequence + queries))
    cached = released - sequences * queries
    folded = tokens * 2 * dim * layer.heads * latents + sequences * (per_sequence + latents * dim * inner)
    return {"released": released, "cached": cached, "folded": folded if folds else cached}


def _feed_forward(layer: Layer) -> tuple[int, int]:
    """Elements of the feed-forward's first and last matrix."""
    first, last = (
        linear.weight.numel() if isinstance(linear, nn.Linear) else 0 for linear in (layer.ffn_in, layer.ffn_out)
    )
    return first, last
