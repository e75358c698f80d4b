"""Multi-exit pooling: checks, schema, fake kernel, autograd and backend choice."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import pooling as reference
from ._registry import Op

MODES = ("mean", "cls", "lasttoken", "max", "mean_sqrt_len", "weightedmean")


def pool_exits(
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    mode: str = "mean",
    dims: Sequence[int] | Sequence[Sequence[int]] | None = None,
    normalize: bool = True,
    out_dtype: torch.dtype | None = None,
) -> list[dict[int, Tensor]]:
    """Pool the hidden states of several exits (layers) into sentence embeddings of several Matryoshka dims at once.

    TODO(docstring): shapes, dtypes, errors, source.
    """
    raise NotImplementedError
