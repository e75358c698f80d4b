"""The search ops on tensors: schemas, fakes and backends. The public functions, with their docs, are in `search`."""

import torch
from torch import Tensor

from .._native import core, num_threads
from ..reference import search as reference
from ..reference.search import sdc_levels
from . import _search_checks as checks
from ._registry import Op

__all__ = ["hamming_topk", "pack_bits", "rescore", "sdc_encode", "sdc_levels", "sdc_topk"]

_KERNEL_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _cpu_pack_bits(x: Tensor) -> Tensor:
    checks.check_pack_bits(x)
    x = x.contiguous()
    codes = _fake_pack_bits(x)
    core.pack_bits(
        x.data_ptr(), _KERNEL_DTYPES[x.dtype], x.shape[:-1].numel(), x.shape[-1], codes.data_ptr(), num_threads()
    )
    return codes


def _fake_pack_bits(x: Tensor) -> Tensor:
    checks.check_pack_bits(x)
    return x.new_empty((*x.shape[:-1], checks.code_bytes(x.shape[-1])), dtype=torch.uint8)


def _cpu_hamming_topk(queries: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    distances, ids = _fake_hamming_topk(queries, codes, k)
    queries, codes = _byte_rows(queries), _byte_rows(codes)
    core.hamming_topk(
        *(queries.data_ptr(), queries.shape[0], queries.stride(0)),
        *(codes.data_ptr(), codes.shape[0], codes.stride(0)),
        *(codes.shape[1], k, distances.data_ptr(), ids.data_ptr(), num_threads()),
    )
    return distances, ids


def _fake_hamming_topk(queries: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    checks.check_hamming_topk(queries, codes, k)
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.int32), queries.new_empty(shape, dtype=torch.int64)


def _cpu_sdc_encode(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    codes, inverse_norms = _fake_sdc_encode(x, bits)
    x = x.float().contiguous()
    checks.raise_not_finite(
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
    queries: Tensor, query_inverse_norms: Tensor, codes: Tensor, inverse_norms: Tensor, bits: int, dim: int, k: int
) -> tuple[Tensor, Tensor]:
    scores, ids = _fake_sdc_topk(queries, query_inverse_norms, codes, inverse_norms, bits, dim, k)
    queries, codes = _byte_rows(queries), _byte_rows(codes)
    query_inverse_norms, inverse_norms = query_inverse_norms.contiguous(), inverse_norms.contiguous()
    core.sdc_topk(
        *(queries.data_ptr(), query_inverse_norms.data_ptr(), queries.shape[0], queries.stride(0)),
        *(codes.data_ptr(), inverse_norms.data_ptr(), codes.shape[0], codes.stride(0)),
        *(dim, bits, k, scores.data_ptr(), ids.data_ptr(), num_threads()),
    )
    return scores, ids


def _fake_sdc_topk(
    queries: Tensor, query_inverse_norms: Tensor, codes: Tensor, inverse_norms: Tensor, bits: int, dim: int, k: int
) -> tuple[Tensor, Tensor]:
    checks.check_sdc_topk(queries, query_inverse_norms, codes, inverse_norms, bits, dim, k)
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


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


def _byte_rows(codes: Tensor) -> Tensor:
    """The codes with the bytes of each row adjacent: as they are, or copied."""
    return codes if codes.stride(1) == 1 else codes.contiguous()


pack_bits = Op(
    "pack_bits(Tensor x) -> Tensor",
    implementations={"cpu": _cpu_pack_bits, "reference": reference.pack_bits},
    fake=_fake_pack_bits,
    accepts={"cpu": frozenset(_KERNEL_DTYPES)},
)
hamming_topk = Op(
    "hamming_topk(Tensor queries, Tensor codes, SymInt k) -> (Tensor distances, Tensor ids)",
    implementations={"cpu": _cpu_hamming_topk, "reference": reference.hamming_topk},
    fake=_fake_hamming_topk,
)
sdc_encode = Op(
    "sdc_encode(Tensor x, int bits) -> (Tensor codes, Tensor inverse_norms)",
    implementations={"cpu": _cpu_sdc_encode, "reference": reference.sdc_encode},
    fake=_fake_sdc_encode,
)
sdc_topk = Op(
    "sdc_topk(Tensor queries, Tensor query_inverse_norms, Tensor codes, Tensor inverse_norms, int bits, SymInt dim, "
    "SymInt k) -> (Tensor scores, Tensor ids)",
    implementations={"cpu": _cpu_sdc_topk, "reference": reference.sdc_topk},
    fake=_fake_sdc_topk,
)
rescore = Op(
    "rescore(Tensor queries, Tensor documents, Tensor candidate_ids, SymInt k) -> (Tensor scores, Tensor ids)",
    implementations={"cpu": _cpu_rescore, "reference": reference.rescore},
    fake=_fake_rescore,
    accepts={"cpu": frozenset({torch.float32})},
)
