"""Relative representations of tensors: schema, fake, autograd and backends. The public function is in `relative`."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._native import core, num_threads
from ..reference import relative as reference
from ._dtypes import DTYPE_CODES
from ._registry import Op

__all__ = ["relative_representations"]


def _cpu(x: Tensor, anchors: Tensor) -> Tensor:
    cosines = _fake(x, anchors)
    x, anchors = x.contiguous(), anchors.contiguous()
    core.relative_representations(
        *(x.data_ptr(), x.shape[0], anchors.data_ptr(), anchors.shape[0], x.shape[1]),
        *(DTYPE_CODES[x.dtype], cosines.data_ptr(), num_threads()),
    )
    return cosines


def _fake(x: Tensor, anchors: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], anchors.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, anchors = ctx.saved_tensors
    return _through_unit(x, grad @ F.normalize(anchors)), _through_unit(anchors, grad.T @ F.normalize(x))


def _through_unit(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of x, given that of x / max(|x|, 1e-12)."""
    norms = x.norm(dim=1, keepdim=True)
    unit = F.normalize(x)
    across = grad - unit * (unit * grad).sum(dim=1, keepdim=True)
    return torch.where(norms > reference.SMALLEST_NORM, across, grad) / norms.clamp(min=reference.SMALLEST_NORM)


relative_representations = Op(
    "relative_representations(Tensor x, Tensor anchors) -> Tensor",
    implementations={"cpu": _cpu, "reference": reference.relative_representations},
    fake=_fake,
    accepts={"cpu": frozenset(DTYPE_CODES)},
    setup_context=_setup_context,
    backward=_backward,
)
