"""Losses between embeddings. Anchors and keys are rows of unit length; key i belongs to anchor i."""

import torch
from torch import Tensor
from torch.nn import functional as F

_NEVER = -1e9  # a logit that takes no part


def contrastive_loss(
    anchors: Tensor, keys: Tensor, anchor_ids: Tensor, key_ids: Tensor, temperature: float, hard_negatives: int
) -> Tensor:
    """Cross-entropy of each anchor's cosine to its own key against those to its hardest negatives.

    Args:
        anchors: [B, D]. keys: [K, D], K >= B; the first B are the anchors' own, in their order.
        anchor_ids, key_ids: [B], [K]; keys with an anchor's id are none of its negatives.
        temperature: cosines are divided by it.
        hard_negatives: how many negatives of largest cosine count.

    Source: Gan et al., KDD 2023, as released: temperature 0.05, the 5 hardest.
    """
    logits = anchors @ keys.T / temperature
    own = logits.diagonal()[:, None]
    others = logits.masked_fill(anchor_ids[:, None] == key_ids, _NEVER)
    hardest = others.topk(min(hard_negatives, others.shape[1]), dim=1).values
    target = torch.zeros(len(anchors), dtype=torch.long, device=anchors.device)
    return F.cross_entropy(torch.cat([own, hardest], dim=1), target)


def neighbourhood_loss(
    anchors: Tensor,
    keys: Tensor,
    anchor_embeddings: Tensor,
    key_embeddings: Tensor,
    anchor_ids: Tensor,
    key_ids: Tensor,
    temperature: float,
) -> Tensor:
    """Cross-entropy between how an anchor spreads over the keys and how its embedding spreads over theirs, itself left
    out: the codes' neighbourhoods are to be the embeddings' own. For embeddings of which no pairs are known.

    Args:
        anchors, keys: codes, [B, D] and [K, D]. anchor_embeddings, key_embeddings: of the same rows.
        anchor_ids, key_ids, temperature: as in `contrastive_loss`.
    """
    same = anchor_ids[:, None] == key_ids
    logits = (anchors @ keys.T / temperature).masked_fill(same, _NEVER)
    wanted = (anchor_embeddings @ key_embeddings.T / temperature).masked_fill(same, _NEVER)
    return F.cross_entropy(logits, wanted.softmax(dim=1))
