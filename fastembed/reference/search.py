"""Search over binary and few-bit codes in plain PyTorch, on any device.

    Hamming   d(q, c)     = number of bits in which q and c differ
    SDC       score(q, c) = float32(v_q . v_c) * (1 / |v_c|) * (1 / |v_q|),   v = 2 c - (2^bits - 1) per dimension

Queries are taken in chunks, so that no intermediate of a search grows with the number of queries.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .._checks import check_finite
from ..ops import _search_checks as checks

# Steps of the uniform quantiser of least squared error for a unit normal source, by bits (Max 1960, table II; beyond
# 5 bits by his conditions). With one bit the only threshold is 0, whatever the step.
OPTIMAL_STEP = {1: 0.0, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
# Elements of the largest intermediate.
CHUNK_ELEMENTS = 1 << 24


def pack_bits(x: Tensor, thresholds: Tensor | None = None) -> Tensor:
    """See `fastembed.pack_bits`."""
    checks.check_pack_bits(x, thresholds)
    return _pack(x > (0 if thresholds is None else thresholds))


def unpack_bits(codes: Tensor, dim: int) -> Tensor:
    """See `fastembed.unpack_bits`."""
    checks.check_unpack_bits(codes, dim)
    return _unpack(codes)[..., :dim].to(torch.uint8)


def hamming_topk(
    queries: Tensor,
    codes: Tensor,
    k: int,
    mask: Tensor | None = None,
    ids: Tensor | None = None,
    ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `fastembed.hamming_topk`."""
    checks.check_hamming_topk(queries, codes, k, mask, ids, ranges)
    checks.check_filter_values(len(codes), ids, ranges)
    allowed = _allowed(len(codes), mask, ids, ranges)
    return _topk(queries, len(codes), k, _hamming_to(codes), allowed, worst=torch.iinfo(torch.int32).max)


def hamming_range(
    queries: Tensor,
    codes: Tensor,
    radius: int,
    mask: Tensor | None = None,
    ids: Tensor | None = None,
    ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastembed.hamming_range`."""
    checks.check_hamming_range(queries, codes, radius, mask, ids, ranges)
    checks.check_filter_values(len(codes), ids, ranges)
    allowed, distances_to = _allowed(len(codes), mask, ids, ranges), _hamming_to(codes)
    lims, distances, found = [0], [], []
    for row in range(len(queries)):
        some, passed = distances_to(queries[row : row + 1]).squeeze(0), allowed(slice(row, row + 1))
        near = (some <= radius if passed is None else (some <= radius) & passed.squeeze(0)).nonzero().squeeze(1)
        order = some[near].argsort(stable=True)
        lims.append(lims[-1] + len(near))
        distances.append(some[near[order]])
        found.append(near[order])
    device = queries.device
    return (
        torch.tensor(lims, device=device),
        torch.cat([*distances, torch.empty(0, dtype=torch.int32, device=device)]),
        torch.cat([*found, torch.empty(0, dtype=torch.int64, device=device)]),
    )


def sdc_encode(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """See `fastembed.sdc_encode`. Returns codes uint8 [N, bits * ceil(D / 8)] and inverse norms float32 [N]."""
    checks.check_sdc_encode(x, bits)
    x = x.float()
    check_finite(x)
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
    dtype = torch.int8 if bits < 8 else torch.int16
    weights = 2 ** torch.arange(bits - 1, -1, -1, dtype=dtype, device=codes.device)
    return 2 * (planes * weights[:, None]).sum(dim=1, dtype=dtype) - (2**bits - 1)


def sdc_topk(
    queries: Tensor,
    query_inverse_norms: Tensor,
    codes: Tensor,
    inverse_norms: Tensor,
    bits: int,
    dim: int,
    k: int,
    mask: Tensor | None = None,
    ids: Tensor | None = None,
    ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `fastembed.sdc_topk`."""
    checks.check_sdc_topk(queries, query_inverse_norms, codes, inverse_norms, bits, dim, k, mask, ids, ranges)
    checks.check_filter_values(len(codes), ids, ranges)
    levels = sdc_levels(codes, bits, dim).double()

    def scores(some: Tensor) -> Tensor:
        rows = some.squeeze(1)
        dots = sdc_levels(queries[rows], bits, dim).double() @ levels.T
        return dots.float() * inverse_norms * query_inverse_norms[rows, None]

    rows = torch.arange(len(queries), device=queries.device)[:, None]
    return _topk(rows, len(codes), k, scores, _allowed(len(codes), mask, ids, ranges), worst=float("-inf"))


def rescore(queries: Tensor, documents: Tensor, candidate_ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `fastembed.rescore`."""
    checks.check_rescore(queries, documents, candidate_ids, k)
    checks.check_candidates(candidate_ids, len(documents))
    # Candidates in the order of their ids, so that a stable sort by score leaves ties to the smaller id.
    candidate_ids = candidate_ids.sort(dim=1).values
    chunk = max(1, CHUNK_ELEMENTS // max(1, candidate_ids.shape[1] * documents.shape[1]))
    scores = torch.cat(
        [
            torch.einsum("qd,qcd->qc", some.float(), documents[ids].float())
            for some, ids in zip(queries.split(chunk), candidate_ids.split(chunk), strict=True)
        ]
    )
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


def _hamming_to(codes: Tensor) -> Callable[[Tensor], Tensor]:
    """From queries to their distances [queries, codes]."""
    code_bits = _unpack(codes).float()
    ones = code_bits.sum(dim=1)

    def distances(queries: Tensor) -> Tensor:
        bits = _unpack(queries).float()
        return (bits.sum(dim=1, keepdim=True) + ones - 2 * bits @ code_bits.T).int()

    return distances


def _allowed(
    codes: int, mask: Tensor | None, ids: Tensor | None, ranges: Tensor | None
) -> Callable[[slice], Tensor | None]:
    """From some queries to what the filters let through, [queries or 1, codes], None being everything."""
    listed = mask.bool() if mask is not None else None
    if ids is not None:
        listed = torch.zeros(codes, dtype=torch.bool, device=ids.device).index_fill(0, ids, True)
    if ranges is None:
        return lambda _: None if listed is None else listed[None]

    def within(rows: slice) -> Tensor:
        some = ranges[rows]
        # +1 where a range begins, -1 where it ends; a running sum above 0 is inside of one.
        steps = torch.zeros(len(some), codes + 1, dtype=torch.int64, device=some.device)
        steps.scatter_add_(1, some[..., 0], torch.ones_like(some[..., 0]))
        steps.scatter_add_(1, some[..., 1], -torch.ones_like(some[..., 1]))
        inside = steps.cumsum(dim=1)[:, :codes] > 0
        return inside if listed is None else inside & listed

    return within


def _topk(
    queries: Tensor,
    codes: int,
    k: int,
    values_of: Callable[[Tensor], Tensor],
    allowed: Callable[[slice], Tensor | None],
    *,
    worst: float,
) -> tuple[Tensor, Tensor]:
    """The k best codes of each query; `values_of` takes rows of `queries` and returns [rows, codes]. Codes that are not
    allowed get the value `worst`, large or small as bad values are, and id -1."""
    values, ids = [], []
    chunk = max(1, CHUNK_ELEMENTS // codes)
    for first in range(0, max(1, len(queries)), chunk):
        rows = slice(first, first + chunk)
        some, passed = values_of(queries[rows]), allowed(rows)
        if passed is not None:
            some = some.masked_fill(~passed, worst)
        best, order = some.sort(dim=1, descending=worst < 0, stable=True)
        best, order = best[:, :k], order[:, :k]
        values.append(best)
        ids.append(order if passed is None else order.masked_fill(best == worst, -1))
    return torch.cat(values), torch.cat(ids)
