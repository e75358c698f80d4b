"""Search over binary and few-bit codes in plain PyTorch, on any device.

    Hamming   d(q, c)     = number of bits in which q and c differ
    SDC       score(q, c) = float32(v_q . v_c) * (1 / |v_c|) * (1 / |v_q|),   v = 2 c - (2^bits - 1) per dimension

Queries are taken in chunks, so that no intermediate of a search grows with the number of queries.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops import _search_checks as checks

# Steps of the uniform quantiser of least squared error for a unit normal source, by bits (Max 1960, table II). With one
# bit the only threshold is 0, whatever the step.
OPTIMAL_STEP = {1: 0.0, 2: 0.9957, 3: 0.5860, 4: 0.3352}
# Elements of the largest intermediate.
CHUNK_ELEMENTS = 1 << 24


def pack_bits(x: Tensor) -> Tensor:
    """See `fastembed.pack_bits`."""
    checks.check_pack_bits(x)
    return _pack(x > 0)


def hamming_topk(queries: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `fastembed.hamming_topk`."""
    checks.check_hamming_topk(queries, codes, k)
    code_bits = _unpack(codes).float()
    ones = code_bits.sum(dim=1)

    def distances(some: Tensor) -> Tensor:
        bits = _unpack(some).float()
        return (bits.sum(dim=1, keepdim=True) + ones - 2 * bits @ code_bits.T).int()

    return _topk(queries, len(codes), k, distances, largest=False)


def sdc_encode(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """See `fastembed.sdc_encode`. Returns codes uint8 [N, bits * ceil(D / 8)] and inverse norms float32 [N]."""
    checks.check_sdc_encode(x, bits)
    x = x.float()
    bad = (~x.isfinite().all(dim=1)).nonzero()
    checks.raise_not_finite(int(bad[0]) if len(bad) else -1)
    half = 2 ** (bits - 1)
    step = OPTIMAL_STEP[bits] * x.double().square().mean(dim=1, keepdim=True).sqrt()
    c = torch.zeros_like(x, dtype=torch.uint8)
    for threshold in range(1 - half, half):
        c += x > (threshold * step).float()
    planes = [_pack((c >> shift & 1).bool()) for shift in reversed(range(bits))]
    levels = 2 * c.double() - (2**bits - 1)
    return torch.cat(planes, dim=1), (1 / levels.square().sum(dim=1).sqrt()).float()


def sdc_levels(codes: Tensor, bits: int, dim: int) -> Tensor:
    """See `fastembed.SDCCodes.levels`."""
    planes = _unpack(codes.reshape(len(codes), bits, checks.code_bytes(dim)))[..., :dim]
    weights = 2 ** torch.arange(bits - 1, -1, -1, dtype=torch.int8, device=codes.device)
    return 2 * (planes * weights[:, None]).sum(dim=1, dtype=torch.int8) - (2**bits - 1)


def sdc_topk(
    queries: Tensor, query_inverse_norms: Tensor, codes: Tensor, inverse_norms: Tensor, bits: int, dim: int, k: int
) -> tuple[Tensor, Tensor]:
    """See `fastembed.sdc_topk`."""
    checks.check_sdc_topk(queries, query_inverse_norms, codes, inverse_norms, bits, dim, k)
    levels = sdc_levels(codes, bits, dim).double()

    def scores(some: Tensor) -> Tensor:
        rows = some.squeeze(1)
        dots = sdc_levels(queries[rows], bits, dim).double() @ levels.T
        return dots.float() * inverse_norms * query_inverse_norms[rows, None]

    return _topk(torch.arange(len(queries), device=queries.device)[:, None], len(codes), k, scores, largest=True)


def rescore(queries: Tensor, documents: Tensor, candidate_ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `fastembed.rescore`."""
    checks.check_rescore(queries, documents, candidate_ids, k)
    checks.check_candidates(candidate_ids, len(documents))
    # Candidates in the order of their ids, so that a stable sort by score leaves ties to the smaller id.
    candidate_ids = candidate_ids.sort(dim=1).values
    scores = torch.einsum("qd,qcd->qc", queries.float(), documents[candidate_ids].float())
    is_nan = scores.isnan()
    order = scores.masked_fill(is_nan, float("-inf")).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, is_nan.gather(1, order).int().argsort(dim=1, stable=True))[:, :k]
    return scores.gather(1, order), candidate_ids.gather(1, order)


def _pack(bits: Tensor) -> Tensor:
    dim = bits.shape[-1]
    padded = torch.nn.functional.pad(bits, (0, -dim % 8)).reshape(*bits.shape[:-1], checks.code_bytes(dim), 8)
    return (padded * _bit_weights(bits.device)).sum(dim=-1, dtype=torch.uint8)


def _unpack(codes: Tensor) -> Tensor:
    return (codes[..., None] & _bit_weights(codes.device) != 0).flatten(-2)


def _bit_weights(device: torch.device) -> Tensor:
    return 2 ** torch.arange(7, -1, -1, dtype=torch.uint8, device=device)


def _topk(
    queries: Tensor, codes: int, k: int, values_of: Callable[[Tensor], Tensor], *, largest: bool
) -> tuple[Tensor, Tensor]:
    """The k best codes of each query; `values_of` takes rows of `queries` and returns [rows, codes]."""
    values, ids = [], []
    for some in queries.split(max(1, CHUNK_ELEMENTS // codes)):
        best, order = values_of(some).sort(dim=1, descending=largest, stable=True)
        values.append(best[:, :k])
        ids.append(order[:, :k])
    return torch.cat(values), torch.cat(ids)
