"""Fixed dimensional encodings in plain PyTorch, on any device: a sequence, a repetition and a block at a time.

    partition(t) = sum over i of 2^i [<x_t, g_i> > 0]              g_0 .. g_(bits-1): the hyperplanes of the repetition
    block(p)     = psi(sum of the tokens of partition p)           of a query
                   psi(their mean)                                 of a document; where there are none, psi(x_t) of the
                                                                   token whose partition differs from p in the fewest
                                                                   bits, the first of several
    encoding     = the blocks of all repetitions, one after another
    result       = sum over i of signs_i encoding_i at buckets_i    where there is a final projection

psi is the linear map of the repetition, or nothing.
"""

from itertools import pairwise

import torch
from torch import Tensor

from .._checks import check_finite


def fde(
    tokens: Tensor,
    cu_seqlens: Tensor,
    hyperplanes: Tensor,
    projections: Tensor | None,
    buckets: Tensor | None,
    signs: Tensor | None,
    final_dim: int,
    documents: bool,
) -> Tensor:
    """Arguments as the fields of `fastembed.FDEMatrices`; tokens float32 [N, dim], cu_seqlens int64 [B + 1]."""
    check_finite(tokens, "tokens")
    offsets = cu_seqlens.tolist()
    sequences = [tokens[start:end] for start, end in pairwise(offsets)]
    encodings = [_encode(sequence, hyperplanes, projections, documents) for sequence in sequences]
    if buckets is None or signs is None:
        return torch.stack(encodings) if encodings else tokens.new_empty(0, final_dim)
    results = [tokens.new_zeros(final_dim).index_add_(0, buckets, signs * encoding) for encoding in encodings]
    return torch.stack(results) if results else tokens.new_empty(0, final_dim)


def _encode(tokens: Tensor, hyperplanes: Tensor, projections: Tensor | None, documents: bool) -> Tensor:
    _, repetitions, bits = hyperplanes.shape
    blocks = []
    for repetition in range(repetitions):
        above = tokens @ hyperplanes[:, repetition] > 0
        partitions = (above.long() << torch.arange(bits, device=tokens.device)).sum(dim=1)
        rows = torch.stack([_block(tokens, partitions, p, bits, documents) for p in range(1 << bits)])
        blocks.append(rows if projections is None else rows @ projections[repetition])
    return torch.stack(blocks).flatten()


def _block(tokens: Tensor, partitions: Tensor, p: int, bits: int, documents: bool) -> Tensor:
    members = tokens[partitions == p]
    if not documents:
        return members.sum(dim=0)
    if len(members):
        return members.sum(dim=0) / len(members)
    if not len(tokens):
        return tokens.new_zeros(tokens.shape[1])
    differing = ((partitions[:, None] ^ p) >> torch.arange(bits, device=tokens.device) & 1).sum(dim=1)
    order = torch.arange(len(tokens), device=tokens.device)
    return tokens[(differing * len(tokens) + order).argmin()]
