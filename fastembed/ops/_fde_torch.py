"""Fixed dimensional encodings of tensors: schema, fake and backends. The public functions, with their docs, are in
`fde`."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .._checks import raise_not_finite
from .._native import core, num_threads
from ..reference import fde as reference
from ._registry import Op


def encode(
    tokens: Tensor, cu_seqlens: Tensor, arrays: Sequence[np.ndarray | None], final_dim: int, documents: bool
) -> Tensor:
    """`arrays`: those of `FDEMatrices`."""
    matrices = [None if array is None else torch.from_numpy(array).to(tokens.device) for array in arrays]
    return _fde(tokens, cu_seqlens, *matrices, final_dim, documents)


def _cpu(
    tokens: Tensor,
    cu_seqlens: Tensor,
    hyperplanes: Tensor,
    projections: Tensor | None,
    buckets: Tensor | None,
    signs: Tensor | None,
    final_dim: int,
    documents: bool,
) -> Tensor:
    dim, repetitions, bits = hyperplanes.shape
    encodings = tokens.new_empty(len(cu_seqlens) - 1, final_dim)
    block_dim = dim if projections is None else projections.shape[2]
    tokens, cu_seqlens, hyperplanes = tokens.contiguous(), cu_seqlens.contiguous(), hyperplanes.contiguous()
    kept = [None if tensor is None else tensor.contiguous() for tensor in (projections, buckets, signs)]
    projections_at, buckets_at, signs_at = (0 if tensor is None else tensor.data_ptr() for tensor in kept)
    first_bad = core.fde(
        *(tokens.data_ptr(), cu_seqlens.data_ptr(), len(cu_seqlens) - 1),
        *(hyperplanes.data_ptr(), projections_at, buckets_at, signs_at),
        *(dim, repetitions, bits, block_dim, final_dim),
        *(documents, encodings.data_ptr(), num_threads()),
    )
    raise_not_finite(first_bad, "tokens")
    return encodings


def _fake(tokens: Tensor, cu_seqlens: Tensor, *rest: object) -> Tensor:
    final_dim = rest[4]
    return tokens.new_empty(cu_seqlens.shape[0] - 1, final_dim)  # type: ignore[call-overload]


_fde = Op(
    "fde(Tensor tokens, Tensor cu_seqlens, Tensor hyperplanes, Tensor? projections, Tensor? buckets, Tensor? signs, "
    "SymInt final_dim, bool documents) -> Tensor",
    implementations={"cpu": _cpu, "reference": reference.fde},
    fake=_fake,
)
