"""Exits of a model, the heads and mixes that belong to them, and what is asked of each."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .nn.mix import LayerMix

Layer = TypeVar("Layer", bound=int | tuple[int, ...])

# A layer and a number of dims.
LayerExit = tuple[int, int]
# A layer, or several whose pooled vectors are mixed, and a number of dims.
Exit = tuple[int | tuple[int, ...], int]

# Weights that sum to 1 let an affine head act on the pooled vector instead of on every token.
_AFFINE_MODES = ("mean", "cls", "lasttoken", "weightedmean")


def check_exits(exits: Any, layer_of: Callable[[Any], Layer]) -> tuple[tuple[Layer, int], ...]:
    """Exits as pairs (layer, dim), of which no two are alike; `layer_of` checks and reads the layer of one."""
    if not isinstance(exits, (list, tuple)) or not exits:
        raise ValueError(f"exits must be a list of at least one (layer, dim), got {exits!r}")
    checked: list[tuple[Layer, int]] = []
    for exit in exits:
        if not isinstance(exit, (list, tuple)) or len(exit) != 2 or type(exit[1]) is not int:
            raise TypeError(f"exits must be pairs of ints (layer, dim), got {exit!r}")
        if (pair := (layer_of(exit), exit[1])) in checked:
            raise ValueError(f"exits must not repeat, got {pair} twice")
        checked.append(pair)
    return tuple(checked)


def one_layer(exit: Any) -> int:
    """The layer of an exit of one layer."""
    if type(exit[0]) is not int:
        raise TypeError(f"exits must be pairs of ints (layer, dim), got {exit!r}")
    layer: int = exit[0]
    return layer


def layer_or_layers(exit: Any) -> int | tuple[int, ...]:
    """The layer of an exit, or the layers that it mixes."""
    layer: int | tuple[int, ...] = tuple(exit[0]) if isinstance(exit[0], (list, tuple)) else exit[0]
    if not layers_of(layer) or not all(type(one) is int for one in layers_of(layer)):
        raise TypeError(f"exits must be pairs of ints (layer, dim), or of several layers and a dim, got {exit!r}")
    if len(set(layers_of(layer))) < len(layers_of(layer)):
        raise ValueError(f"exits must not repeat a layer, got {exit!r}")
    return layer


def layers_of(layer: int | tuple[int, ...]) -> tuple[int, ...]:
    """The layers of an exit of one or several."""
    return layer if isinstance(layer, tuple) else (layer,)


def last_layer(exits: Sequence[Exit]) -> int:
    """The deepest layer of any exit."""
    return max(layer for layers, _ in exits for layer in layers_of(layers))


def check_in_model(
    exits: Iterable[Exit], widths: Sequence[int], head_widths: Mapping[int, int] | None = None, modes: int = 1
) -> None:
    """Raise ValueError unless a model has the layers and dims of every exit.

    Args:
        exits: as `check_exits` returns them.
        widths: features of the model's embedding output and behind every layer.
        head_widths: features that come out of the heads, by layer.
        modes: how many pooled vectors stand side by side.
    """
    depth = len(widths) - 1
    for layer, dim in exits:
        if not all(0 <= one <= depth for one in layers_of(layer)):
            raise ValueError(f"exits must name layers 0 (the embeddings) to {depth}, got {(layer, dim)}")
        features = [widths[one] for one in layers_of(layer)]
        if len(set(features)) > 1:
            raise ValueError(f"exits must mix layers of one width, got {(layer, dim)}, of {features} features")
        of_head = (head_widths or {}).get(layer) if isinstance(layer, int) else None
        width = modes * (features[0] if of_head is None else of_head)
        if not 1 <= dim <= width:
            raise ValueError(f"exits must have dims of 1 to {width} at layer {layer}, got {(layer, dim)}")


def check_heads(heads: Mapping[int, nn.Module] | None, widths: Sequence[int]) -> dict[str, nn.Module]:
    """Heads by the names that nn.ModuleDict wants, checked against the features behind every layer."""
    _check_mapping("heads", heads)
    checked = {}
    for layer, head in (heads or {}).items():
        if not isinstance(head, nn.Module):
            raise TypeError(f"heads must map layers to modules, got a {type(head).__name__} for layer {layer}")
        if type(layer) is not int or not 0 <= layer < len(widths):
            raise ValueError(f"heads must be for layers 0 (the embeddings) to {len(widths) - 1}, got one for {layer!r}")
        if getattr(head, "in_features", widths[layer]) != widths[layer]:
            raise ValueError(
                f"heads must take the model's {widths[layer]} features, got one of {head.in_features} for layer {layer}"
            )
        checked[str(layer)] = head
    return checked


def head_width(head: nn.Module, layer: str, hidden_size: int) -> int:
    """Features that come out of a head."""
    if isinstance(width := getattr(head, "out_features", None), int):
        return width
    parameter = next(head.parameters(), torch.empty(0))
    try:
        with torch.no_grad():
            output: Tensor = head(torch.zeros(1, 1, hidden_size, dtype=parameter.dtype, device=parameter.device))
    except RuntimeError as error:
        raise ValueError(
            f"heads must take the model's {hidden_size} features, and that of layer {layer} fails on them: {error}"
        ) from error
    return output.shape[-1]


def commutes(head: nn.Module, mode: str | Sequence[str]) -> bool:
    """Whether the head of a pooled vector is the pooled vector of the head."""
    if not isinstance(head, nn.Linear) or not isinstance(mode, str):
        return False
    return mode in _AFFINE_MODES or (mode == "mean_sqrt_len" and head.bias is None)


def check_mixes(
    mixes: Mapping[tuple[int, ...], LayerMix] | None, exit_layers: Sequence[int | tuple[int, ...]]
) -> dict[str, LayerMix]:
    """Mixes by `mix_name`, checked against the layers of the exits."""
    _check_mapping("mixes", mixes)
    checked = {}
    for layers, mix in (mixes or {}).items():
        if not isinstance(mix, LayerMix):
            raise TypeError(f"mixes must map layers to LayerMix modules, got a {type(mix).__name__} for {layers!r}")
        if layers not in exit_layers or not isinstance(layers, tuple):
            raise ValueError(f"mixes must belong to layers with an exit, got one for {layers!r}")
        if len(mix.logits) != len(layers):
            raise ValueError(f"mixes must have a weight per layer, got {len(mix.logits)} for {layers}")
        checked[mix_name(layers)] = mix
    return checked


def mix_name(layers: Sequence[int]) -> str:
    """What nn.ModuleDict calls the mix of these layers."""
    return "_".join(map(str, layers))


def _check_mapping(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict by layer, got {type(value).__name__}")
