"""Pooling modules."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops._pooling_checks import check_modes
from ..ops.pooling import pool_exits


class MultiExitPooling(nn.Module):
    """Pools several exits (layers) of an encoder into embeddings of several Matryoshka dims: `pool_exits` as a module.

    It has no parameters and no state. The exits may be any layers of the encoder, the embedding output included:
    pass the ones wanted, `[output.hidden_states[layer] for layer in layers]`.

    Args:
        mode, dims, normalize, out_dtype: as `fastembed.pool_exits` takes them.

    Shapes:
        hidden_states: a list of [B, T, D], or of packed [N, D] or [1, N, D] with `cu_seqlens`.
        attention_mask: [B, T], or [B, 1, 1, T]. cu_seqlens: [B + 1]. ranges: [B, 2]. positions: [B, P].
        Returns: one dict per exit, dim -> [B, dim].
    """

    def __init__(
        self,
        mode: str | Sequence[str] = "mean",
        dims: Sequence[int] | Sequence[Sequence[int]] | None = None,
        normalize: bool = True,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_modes(mode)
        self.mode = mode
        self.dims = dims
        self.normalize = normalize
        self.out_dtype = out_dtype

    def forward(
        self,
        hidden_states: Sequence[Tensor],
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        ranges: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> list[dict[int, Tensor]]:
        """Pool every exit; see `fastembed.pool_exits` for shapes and errors."""
        return pool_exits(
            hidden_states,
            attention_mask,
            cu_seqlens=cu_seqlens,
            ranges=ranges,
            positions=positions,
            mode=self.mode,
            dims=self.dims,
            normalize=self.normalize,
            out_dtype=self.out_dtype,
        )

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, dims={self.dims}, normalize={self.normalize}, out_dtype={self.out_dtype}"
