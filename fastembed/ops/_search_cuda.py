"""The search ops on CUDA kernels: what csrc/search/search.cu leaves of every slice of the codes, put in order here."""

from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference import search as reference
from . import _search_checks as checks
from ._cuda import current_stream

_NO_ID = -1
# Compute capabilities from which on the compiler imitates one-bit tensor-core products by others.
_NO_BIT_PRODUCTS = (10, 0)
# Of the codes of `sdc_topk`.
MOST_BITS = 4
# Bytes that a launch may have to work in; where queries need more, they take several.
WORKSPACE = 1 << 29


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
    return _find(queries, None, codes, None, 1, width, 8 * width, k, mask, ids, ranges)


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
    """See `fastembed.sdc_topk`. Codes of more than 4 bits run as their reference."""
    arguments = (queries, query_inverse_norms, codes, inverse_norms, bits, dim, k, mask, ids, ranges)
    if bits > MOST_BITS:
        return reference.sdc_topk(*arguments)
    checks.check_sdc_topk(*arguments)
    norms = (query_inverse_norms.contiguous(), inverse_norms.contiguous())
    keys, found = _find(queries, norms[0], codes, norms[1], bits, checks.code_bytes(dim), dim, k, mask, ids, ranges)
    return scores_of(keys, found), found


def scores_of(keys: Tensor, found: Tensor) -> Tensor:
    """The scores whose bits stand in keys that fall as scores rise; -inf where nothing was found."""
    bits = ~keys
    bits = bits ^ (bits >> 31 & 0x7FFFFFFF)
    return bits.view(torch.float32).masked_fill(found == _NO_ID, float("-inf"))


def best_of(keys: Tensor, found: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest keys [Q, k] and their ids of candidates [Q, C] that stand in the order of their ids."""
    keys, order = keys.sort(dim=1, stable=True)
    return keys[:, :k].contiguous(), found.gather(1, order[:, :k]).long()


def allowed(codes: Tensor, mask: Tensor | None, ids: Tensor | None) -> Tensor | None:
    """uint8 [N], zero for the codes that `mask` or `ids` keep from being searched."""
    if ids is not None:
        return torch.zeros(len(codes), dtype=torch.uint8, device=codes.device).index_fill(0, ids, 1)
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _find(
    queries: Tensor,
    query_norms: Tensor | None,
    codes: Tensor,
    norms: Tensor | None,
    bits: int,
    plane_bytes: int,
    dim: int,
    k: int,
    mask: Tensor | None,
    ids: Tensor | None,
    ranges: Tensor | None,
) -> tuple[Tensor, Tensor]:
    checks.check_filter_values(len(codes), ids, ranges)
    queries, codes = byte_rows(queries), byte_rows(codes)
    listed = allowed(codes, mask, ids)
    ranges = None if ranges is None else ranges.contiguous()
    cuda = _native.cuda
    assert cuda is not None, "the backend is chosen only where it is available"

    def launch(rows: slice, stream: int) -> tuple[Tensor, Tensor]:
        some = queries[rows]
        norms_of_some = None if query_norms is None else query_norms[rows]
        ranges_of_some = (0, -1) if ranges is None else (ranges[rows].data_ptr(), ranges.shape[1])
        sizes = (len(some), len(codes), k)
        keys = some.new_empty((len(some), cuda.search_slices(*sizes) * k), dtype=torch.int32)
        found = torch.empty_like(keys)
        workspace = some.new_empty(cuda.search_workspace(*sizes))
        cuda.find_candidates(
            _tuple(some, norms_of_some),
            _tuple(codes, norms),
            *(bits, plane_bytes, dim, _has_bit_products(some.device)),
            0 if listed is None else listed.data_ptr(),
            *ranges_of_some,
            *(k, keys.data_ptr(), found.data_ptr(), workspace.data_ptr(), stream),
        )
        return best_of(keys, found, k)

    at_once = max(1, len(queries))
    while at_once > 1 and cuda.search_workspace(at_once, len(codes), k) > WORKSPACE:
        at_once = (at_once + 1) // 2
    with current_stream(queries.device) as stream:
        parts = [launch(slice(first, first + at_once), stream) for first in range(0, max(1, len(queries)), at_once)]
    keys, found = (torch.cat(part) if len(parts) > 1 else part[0] for part in zip(*parts, strict=True))
    return keys, found


def byte_rows(codes: Tensor) -> Tensor:
    """The codes with the bytes of each row adjacent: as they are, or copied."""
    return codes if codes.stride(1) == 1 else codes.contiguous()


def _tuple(codes: Tensor, norms: Tensor | None) -> tuple[Any, ...]:
    return (codes.data_ptr(), len(codes), codes.stride(0), 0 if norms is None else norms.data_ptr())


def _has_bit_products(device: torch.device) -> bool:
    return device.type == "cpu" or torch.cuda.get_device_capability(device) < _NO_BIT_PRODUCTS
