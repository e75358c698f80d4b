"""What is done to a transformers encoder beyond its linear layers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import backbones
from .batches import SLICE_TOKENS

# Arguments of an encoder's forward that hold one row per sequence.
_BATCHED = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")


def find_encoders(model: nn.Module) -> list[PreTrainedModel]:
    """The outermost transformers models in a model, which may be one itself, that read whole sequences at once."""
    found: list[PreTrainedModel] = []
    inside: set[nn.Module] = set()
    for module in model.modules():  # parents come before their children
        if isinstance(module, PreTrainedModel) and module not in inside:
            inside.update(module.modules())
            if not (getattr(module.config, "is_decoder", False) or getattr(module.config, "is_encoder_decoder", False)):
                found.append(module)
    return found


def forward_in_slices(encoder: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """The encoder's own forward, in inference on the CPU over one slice of a large batch after the other."""
    forward = type(encoder).forward
    whole = args or torch.compiler.is_compiling() or torch.is_grad_enabled() or _returns_cache(encoder, kwargs)
    rows = None if whole or backbones.is_watched() else _rows_per_slice(kwargs)
    if rows is None:
        return forward(encoder, *args, **kwargs)
    batched = {name: value for name, value in kwargs.items() if name in _BATCHED and value is not None}
    batch = next(iter(batched.values())).shape[0]
    outputs = []
    for start in range(0, batch, rows):
        piece = {name: value[start : start + rows] for name, value in batched.items()}
        outputs.append(forward(encoder, **{**kwargs, **piece}))
    return _concatenate(outputs)


def _returns_cache(encoder: PreTrainedModel, kwargs: Mapping[str, Any]) -> bool:
    """Whether a decoder is asked for the cache of its tokens, which is in one piece."""
    wanted = kwargs.get("use_cache")
    if wanted is None:
        wanted = getattr(encoder.config, "use_cache", False)
    # Decoders have no such setting; models that can be either have it off as encoders.
    return bool(wanted) and getattr(encoder.config, "is_decoder", True)


def _rows_per_slice(kwargs: Mapping[str, Any]) -> int | None:
    """Sequences per slice, or None when the call is to run whole."""
    tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
    tokens = tensors.get("input_ids", tensors.get("inputs_embeds"))
    if tokens is None or tokens.device.type != "cpu" or tokens.dim() < 2:
        return None
    batch, length = tokens.shape[:2]
    rows = max(1, SLICE_TOKENS // max(1, length))
    # Anything that is not one row per sequence, or may not be, says nothing about how to cut it.
    if batch <= rows or any(name not in _BATCHED or value.shape[0] != batch for name, value in tensors.items()):
        return None
    if any(value is not None and not isinstance(value, (Tensor, bool)) for value in kwargs.values()):
        return None
    return rows


def _concatenate(pieces: list[Any]) -> Any:
    """Model outputs of consecutive slices as one: tensors by their first axis, containers item by item."""
    first = pieces[0]
    if isinstance(first, Tensor):
        return torch.cat(pieces)
    if isinstance(first, Mapping):
        return type(first)(**{key: _concatenate([piece[key] for piece in pieces]) for key in first})
    if isinstance(first, tuple):
        return tuple(_concatenate(list(items)) for items in zip(*pieces, strict=True))
    return first
