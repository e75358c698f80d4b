"""The search ops on tensors: schemas, fakes and backends. The public functions, with their docs, are in `search`."""

from typing import Any

import torch
from torch import Tensor

from .._checks import raise_not_finite
from .._native import core, num_threads
from ..backends import forced_backend, unavailable_reason
from ..reference import search as reference
from ..reference.search import sdc_levels
from . import _search_checks as checks
from . import _search_cuda, _search_triton
from ._registry import Op
from ._search_cuda import byte_rows

__all__ = [
    "as_float32",
    "hamming_range",
    "hamming_topk",
    "pack_bits",
    "rescore",
    "sdc_encode",
    "sdc_levels",
    "sdc_topk",
    "unique",
    "unpack_bits",
]

_KERNEL_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _cpu_pack_bits(x: Tensor, thresholds: Tensor | None = None) -> Tensor:
    codes = _fake_pack_bits(x, thresholds)
    x = x.contiguous()
    thresholds = None if thresholds is None else thresholds.contiguous()
    core.pack_bits(
        *(x.data_ptr(), _KERNEL_DTYPES[x.dtype], x.shape[:-1].numel(), x.shape[-1]),
        *(0 if thresholds is None else thresholds.data_ptr(), codes.data_ptr(), num_threads()),
    )
    return codes


def _fake_pack_bits(x: Tensor, thresholds: Tensor | None = None) -> Tensor:
    checks.check_pack_bits(x, thresholds)
    return x.new_empty((*x.shape[:-1], checks.code_bytes(x.shape[-1])), dtype=torch.uint8)


def _fake_unpack_bits(codes: Tensor, dim: int) -> Tensor:
    checks.check_unpack_bits(codes, dim)
    return codes.new_empty((*codes.shape[:-1], dim))


def _cpu_hamming_topk(
    queries: Tensor,
    codes: Tensor,
    k: int,
    mask: Tensor | None = None,
    ids: Tensor | None = None,
    ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    distances, found = _fake_hamming_topk(queries, codes, k, mask, ids, ranges)
    selection = _Selection(codes, mask, ids, ranges)
    queries, codes = byte_rows(queries), byte_rows(codes)
    core.hamming_topk(
        *(queries.data_ptr(), queries.shape[0], queries.stride(0)),
        *(codes.data_ptr(), codes.shape[0], codes.stride(0), codes.shape[1]),
        selection.parts,
        *(k, distances.data_ptr(), found.data_ptr(), num_threads()),
    )
    return distances, found


def _fake_hamming_topk(
    queries: Tensor,
    codes: Tensor,
    k: int,
    mask: Tensor | None = None,
    ids: Tensor | None = None,
    ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    checks.check_hamming_topk(queries, codes, k, mask, ids, ranges)
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.int32), queries.new_empty(shape, dtype=torch.int64)


def _cpu_hamming_range(
    queries: Tensor,
    codes: Tensor,
    radius: int,
    mask: Tensor | None = None,
    ids: Tensor | None = None,
    ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.check_hamming_range(queries, codes, radius, mask, ids, ranges)
    selection = _Selection(codes, mask, ids, ranges)
    queries, codes = byte_rows(queries), byte_rows(codes)
    result = core.hamming_range(
        *(queries.data_ptr(), queries.shape[0], queries.stride(0)),
        *(codes.data_ptr(), codes.shape[0], codes.stride(0), codes.shape[1]),
        selection.parts,
        *(checks.within_codes(radius, codes), num_threads()),
    )
    lims, distances, found = _range_outputs(queries, result.total)
    result.write(lims.data_ptr(), distances.data_ptr(), found.data_ptr())
    return lims, distances, found


def _fake_hamming_range(
    queries: Tensor,
    codes: Tensor,
    radius: int,
    mask: Tensor | None = None,
    ids: Tensor | None = None,
    ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.check_hamming_range(queries, codes, radius, mask, ids, ranges)
    return _range_outputs(queries, torch.library.get_ctx().new_dynamic_size())


def _range_outputs(queries: Tensor, total: int | torch.SymInt) -> tuple[Tensor, Tensor, Tensor]:
    return (
        queries.new_empty(queries.shape[0] + 1, dtype=torch.int64),
        queries.new_empty(total, dtype=torch.int32),
        queries.new_empty(total, dtype=torch.int64),
    )


def _cpu_sdc_encode(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    codes, inverse_norms = _fake_sdc_encode(x, bits)
    x = x.float().contiguous()
    raise_not_finite(
        core.sdc_encode(
            *(x.data_ptr(), x.shape[0], x.shape[1], bits, codes.data_ptr(), inverse_norms.data_ptr(), num_threads())
        )
    )
    return codes, inverse_norms


def _fake_sdc_encode(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    checks.check_sdc_encode(x, bits)
    codes = x.new_empty((x.shape[0], bits * checks.code_bytes(x.shape[1])), dtype=torch.uint8)
    return codes, x.new_empty(x.shape[0], dtype=torch.float32)


def _cpu_sdc_topk(
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
    scores, found = _fake_sdc_topk(queries, query_inverse_norms, codes, inverse_norms, bits, dim, k, mask, ids, ranges)
    selection = _Selection(codes, mask, ids, ranges)
    queries, codes = byte_rows(queries), byte_rows(codes)
    query_inverse_norms, inverse_norms = query_inverse_norms.contiguous(), inverse_norms.contiguous()
    core.sdc_topk(
        *(queries.data_ptr(), query_inverse_norms.data_ptr(), queries.shape[0], queries.stride(0)),
        *(codes.data_ptr(), inverse_norms.data_ptr(), codes.shape[0], codes.stride(0)),
        *(dim, bits),
        selection.parts,
        *(k, scores.data_ptr(), found.data_ptr(), num_threads()),
    )
    return scores, found


def _fake_sdc_topk(
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
    checks.check_sdc_topk(queries, query_inverse_norms, codes, inverse_norms, bits, dim, k, mask, ids, ranges)
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


def _gpu_sdc_topk(*arguments: Any) -> tuple[Tensor, Tensor]:
    """On CUDA C++; on Triton, if it is there, codes that have more bits than that takes, unless CUDA was asked for."""
    bits = arguments[4]
    if bits > _search_cuda.MOST_BITS and forced_backend() is None and unavailable_reason("triton") is None:
        return _search_triton.sdc_topk(*arguments)
    return _search_cuda.sdc_topk(*arguments)


def _cpu_rescore(queries: Tensor, documents: Tensor, candidate_ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    scores, ids = _fake_rescore(queries, documents, candidate_ids, k)
    checks.check_candidates(candidate_ids, documents.shape[0])
    queries, documents, candidate_ids = queries.contiguous(), documents.contiguous(), candidate_ids.contiguous()
    core.rescore(
        *(queries.data_ptr(), queries.shape[0], documents.data_ptr(), documents.shape[1]),
        *(candidate_ids.data_ptr(), candidate_ids.shape[1], k, scores.data_ptr(), ids.data_ptr(), num_threads()),
    )
    return scores, ids


def _fake_rescore(queries: Tensor, documents: Tensor, candidate_ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    checks.check_rescore(queries, documents, candidate_ids, k)
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


def unique(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct ids, ascending, and where each of `ids` stands among them."""
    return torch.unique(ids, return_inverse=True)


def as_float32(x: Tensor) -> Tensor:
    return x.float()


class _Selection:
    """The filters of a search as the kernels take them; holds on to the tensors that `parts` points into."""

    def __init__(self, codes: Tensor, mask: Tensor | None, ids: Tensor | None, ranges: Tensor | None) -> None:
        checks.check_filter_values(codes.shape[0], ids, ranges)
        ids = mask.nonzero().squeeze(1) if mask is not None else ids
        self._ids = None if ids is None else ids.contiguous()
        self._ranges = None if ranges is None else ranges.contiguous()
        self.parts = (
            *((0, -1) if self._ids is None else (self._ids.data_ptr(), self._ids.shape[0])),
            *((0, -1) if self._ranges is None else (self._ranges.data_ptr(), self._ranges.shape[1])),
        )


_FILTERS = "Tensor? mask=None, Tensor? ids=None, Tensor? ranges=None"

pack_bits = Op(
    "pack_bits(Tensor x, Tensor? thresholds=None) -> Tensor",
    implementations={"cpu": _cpu_pack_bits, "reference": reference.pack_bits},
    fake=_fake_pack_bits,
    accepts={"cpu": frozenset(_KERNEL_DTYPES)},
)
unpack_bits = Op(
    "unpack_bits(Tensor codes, SymInt dim) -> Tensor",
    implementations={"reference": reference.unpack_bits},
    fake=_fake_unpack_bits,
)
hamming_topk = Op(
    f"hamming_topk(Tensor queries, Tensor codes, SymInt k, {_FILTERS}) -> (Tensor distances, Tensor ids)",
    implementations={
        "cpu": _cpu_hamming_topk,
        "cuda": _search_cuda.hamming_topk,
        "triton": _search_triton.hamming_topk,
        "reference": reference.hamming_topk,
    },
    fake=_fake_hamming_topk,
)
hamming_range = Op(
    f"hamming_range(Tensor queries, Tensor codes, SymInt radius, {_FILTERS}) -> "
    "(Tensor lims, Tensor distances, Tensor ids)",
    implementations={"cpu": _cpu_hamming_range, "reference": reference.hamming_range},
    fake=_fake_hamming_range,
)
sdc_encode = Op(
    "sdc_encode(Tensor x, int bits) -> (Tensor codes, Tensor inverse_norms)",
    implementations={"cpu": _cpu_sdc_encode, "reference": reference.sdc_encode},
    fake=_fake_sdc_encode,
)
sdc_topk = Op(
    "sdc_topk(Tensor queries, Tensor query_inverse_norms, Tensor codes, Tensor inverse_norms, int bits, SymInt dim, "
    f"SymInt k, {_FILTERS}) -> (Tensor scores, Tensor ids)",
    implementations={
        "cpu": _cpu_sdc_topk,
        "cuda": _gpu_sdc_topk,
        "triton": _search_triton.sdc_topk,
        "reference": reference.sdc_topk,
    },
    fake=_fake_sdc_topk,
)
rescore = Op(
    "rescore(Tensor queries, Tensor documents, Tensor candidate_ids, SymInt k) -> (Tensor scores, Tensor ids)",
    implementations={"cpu": _cpu_rescore, "reference": reference.rescore},
    fake=_fake_rescore,
    accepts={"cpu": frozenset({torch.float32})},
)
