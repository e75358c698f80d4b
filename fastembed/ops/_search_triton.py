"""The search ops on Triton kernels: queries made ready for the products of triton_kernels/search.py.

A code c of `bits` bits meets the queries as t = c - 2^(bits - 1); a level is v = 2 t + 1.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..reference.scalar_codes import scalar_integers
from ..reference.search import sdc_levels
from . import _scalar_codes_checks as scalar_checks
from . import _search_checks as checks
from ._search_cuda import allowed, byte_rows, scores_of

if TYPE_CHECKING:
    from ..triton_kernels.search import Queries

# The second of two bytes that a query has for a dimension.
_LOW_BITS = 7


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
    width = codes.shape[1]
    levels = sdc_levels(queries, 1, 8 * width).int()
    # (D - v . v') / 2 = (D - sum v') / 2 - t . v'
    offsets = (8 * width - levels.sum(dim=1, keepdim=True)) // 2
    prepared = _prepared([levels], offsets, -1, None)
    return _find("hamming", prepared, codes, None, 1, width, 8 * width, k, mask, ids, ranges)


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
    parts = _parts(sdc_levels(queries, bits, dim).int(), bits + 1)
    # v . v' = 2 t . v' + sum v'
    prepared = _prepared(parts, _sums(parts), 2, query_inverse_norms.contiguous())
    keys, found = _find("sdc", prepared, codes, inverse_norms, bits, checks.code_bytes(dim), dim, k, mask, ids, ranges)
    return scores_of(keys, found), found


def scalar_topk(
    queries: Tensor,
    query_factors: Tensor,
    query_bits: int,
    codes: Tensor,
    factors: Tensor,
    bits: int,
    dim: int,
    k: int,
    mask: Tensor | None = None,
    ids: Tensor | None = None,
    ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `fastembed.scalar_topk`."""
    scalar_checks.check_topk(queries, query_factors, query_bits, codes, factors, bits, dim, k, mask, ids, ranges)
    half = 2 ** (query_bits - 1)
    s = scalar_integers(queries, query_bits, dim) - half
    parts = _parts(s, query_bits)
    lower, step, _, extra = query_factors.unbind(dim=1)
    columns = (s.sum(dim=1).float(), step, lower + step * half, extra + 0)
    # c . s = t . s + 2^(bits - 1) sum s
    prepared = _prepared(parts, 2 ** (bits - 1) * _sums(parts), 1, torch.stack(columns, dim=1))
    keys, found = _find("scalar", prepared, codes, factors, bits, checks.code_bytes(dim), dim, k, mask, ids, ranges)
    return scores_of(keys, found), found


def _parts(integers: Tensor, bits: int) -> list[Tensor]:
    """Signed integers of so many bits as signed bytes: themselves, or i and j of 128 i + j."""
    if bits <= 8:
        return [integers]
    low = integers & ((1 << _LOW_BITS) - 1)
    return [(integers - low) >> _LOW_BITS, low]


def _sums(parts: list[Tensor]) -> Tensor:
    return torch.stack([part.sum(dim=1) for part in parts], dim=1)


def _prepared(parts: list[Tensor], offsets: Tensor, scale: int, factors: Tensor | None) -> "Queries":
    from ..triton_kernels import search

    padding = -parts[0].shape[1] % search.DIMS_AT_A_TIME
    padded = torch.nn.functional.pad(torch.stack(parts, dim=1), (0, padding))
    return search.Queries(padded.to(torch.int8), offsets.int().contiguous(), scale, factors)


def _find(
    metric: str,
    queries: "Queries",
    codes: Tensor,
    factors: Tensor | None,
    bits: int,
    plane_bytes: int,
    dim: int,
    k: int,
    mask: Tensor | None,
    ids: Tensor | None,
    ranges: Tensor | None,
) -> tuple[Any, Any]:
    """Imports Triton at the first call: it is optional, and slow to import."""
    from ..triton_kernels import search

    checks.check_filter_values(len(codes), ids, ranges)
    factors = None if factors is None else factors.contiguous()
    searched = search.Codes(byte_rows(codes), plane_bytes, dim, factors, allowed(codes, mask, ids))
    return search.find(metric, queries, searched, bits, None if ranges is None else ranges.contiguous(), k)
