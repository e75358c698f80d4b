"""The ops of scalar codes on tensors: schemas, fakes and backends."""

import torch
from torch import Tensor

from .._checks import raise_not_finite
from .._native import core, num_threads
from ..reference import scalar_codes as reference
from ..reference.scalar_codes import scalar_integers
from . import _scalar_codes_checks as scalar_checks
from . import _search_checks as checks
from . import _search_triton
from ._registry import Op
from ._search_cuda import byte_rows
from ._search_torch import _FILTERS, _KERNEL_DTYPES, _Selection

__all__ = ["scalar_encode", "scalar_integers", "scalar_topk"]


def _cpu_scalar_encode(
    x: Tensor, centroid: Tensor | None, signs: Tensor | None, bits: int, method: str, metric: str
) -> tuple[Tensor, Tensor]:
    codes, factors = _fake_scalar_encode(x, centroid, signs, bits, method, metric)
    x = x.contiguous() if x.dtype in _KERNEL_DTYPES else x.float().contiguous()
    centroid = None if centroid is None else centroid.contiguous()
    signs = None if signs is None else signs.contiguous()
    bad = core.scalar_encode(
        *(x.data_ptr(), _KERNEL_DTYPES[x.dtype], x.shape[0], x.shape[1]),
        *(0 if centroid is None else centroid.data_ptr(), 0 if signs is None else signs.data_ptr()),
        *(bits, scalar_checks.METHODS[method], scalar_checks.METRICS[metric]),
        *(codes.data_ptr(), factors.data_ptr(), num_threads()),
    )
    raise_not_finite(bad)
    return codes, factors


def _fake_scalar_encode(
    x: Tensor, centroid: Tensor | None, signs: Tensor | None, bits: int, method: str, metric: str
) -> tuple[Tensor, Tensor]:
    scalar_checks.check_encode(x, centroid, signs, bits, method, metric)
    codes = x.new_empty((x.shape[0], bits * checks.code_bytes(x.shape[1])), dtype=torch.uint8)
    return codes, x.new_empty((x.shape[0], scalar_checks.FACTORS), dtype=torch.float32)


def _cpu_scalar_topk(
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
    scores, found = _fake_scalar_topk(
        queries, query_factors, query_bits, codes, factors, bits, dim, k, mask, ids, ranges
    )
    selection = _Selection(codes, mask, ids, ranges)
    queries, codes = byte_rows(queries), byte_rows(codes)
    query_factors, factors = query_factors.contiguous(), factors.contiguous()
    core.scalar_topk(
        *(queries.data_ptr(), query_factors.data_ptr(), queries.shape[0], queries.stride(0), query_bits),
        *(codes.data_ptr(), factors.data_ptr(), codes.shape[0], codes.stride(0), bits, dim),
        selection.parts,
        *(k, scores.data_ptr(), found.data_ptr(), num_threads()),
    )
    return scores, found


def _fake_scalar_topk(
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
    scalar_checks.check_topk(queries, query_factors, query_bits, codes, factors, bits, dim, k, mask, ids, ranges)
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


scalar_encode = Op(
    "scalar_encode(Tensor x, Tensor? centroid, Tensor? signs, int bits, str method, str metric) "
    "-> (Tensor codes, Tensor factors)",
    implementations={"cpu": _cpu_scalar_encode, "reference": reference.scalar_encode},
    fake=_fake_scalar_encode,
)
scalar_topk = Op(
    "scalar_topk(Tensor queries, Tensor query_factors, int query_bits, Tensor codes, Tensor factors, int bits, "
    f"SymInt dim, SymInt k, {_FILTERS}) -> (Tensor scores, Tensor ids)",
    implementations={
        "cpu": _cpu_scalar_topk,
        "triton": _search_triton.scalar_topk,
        "reference": reference.scalar_topk,
    },
    fake=_fake_scalar_topk,
)
