"""Dense exits: an embedding of every token or patch, at several layers and dims, from one forward pass."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ._exits import LayerExit, check_exits, check_in_model, one_layer
from .integrations.backbones import find_backbone, stream_layers
from .ops.pooling import pool_exits


def dense_exits(
    model: nn.Module,
    exits: Sequence[LayerExit],
    *,
    normalize: bool = True,
    final_norm: bool = False,
    layers: str | None = None,
    **inputs: Any,
) -> dict[LayerExit, Tensor]:
    """Embeddings of every token or image patch, for late interaction and for dense prediction.

    Each is read once, the moment its layer has run, and comes out truncated and normalised; no hidden states are kept,
    and the pass ends after the last exit. Feature maps (SegFormer's stages) are read as their H * W places, row by row.
    Differentiable.

    Args:
        model: a transformers model, text or vision.
        exits: (layer, dim) pairs; layer 0 is the embedding output (patch embeddings with their positions).
        normalize: whether embeddings are L2-normalised, after truncation.
        final_norm: whether hidden states of earlier layers go through the norm behind the last one too, as
            `MultiExitEncoder` does. The last layer's always go.
        layers: where the list of layers stands in the model, if it is not found by itself.
        **inputs: what the model's forward takes: pixel_values, or input_ids and attention_mask.

    Returns:
        (layer, dim) -> [B, T, dim] in the dtype of the hidden states, class tokens and padding included.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: exits out of range, repeated or none; a model whose layers are not found.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    backbone = find_backbone(model, layers)
    depth = len(backbone.layers)
    checked = check_exits(exits, one_layer)
    check_in_model(checked, backbone.widths)
    dims: dict[int, list[int]] = {}
    for layer, dim in checked:
        dims.setdefault(layer, []).append(dim)
    norm = backbone.final_norm
    embeddings: dict[LayerExit, Tensor] = {}

    def receive(layer: int, hidden: Tensor) -> None:
        if layer not in dims:
            return
        if norm is not None and (final_norm or layer == depth):
            hidden = norm(hidden)
        batch, tokens, width = hidden.shape
        # Every token is a sequence of its own: what is left of pooling is truncation and normalisation.
        pooled = pool_exits(
            [hidden.reshape(batch * tokens, 1, width)], mode="cls", dims=dims[layer], normalize=normalize
        )
        embeddings.update({(layer, dim): rows.view(batch, tokens, dim) for dim, rows in pooled[0].items()})

    stream_layers(backbone, inputs, max(dims), receive)
    return {(layer, dim): embeddings[layer, dim] for layer, dim in checked}
