"""The layers of a transformers backbone, and its hidden states while it runs."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# What architectures call the norm behind their last layer; those that normalise inside each layer have none.
_FINAL_NORMS = ("norm", "final_norm", "final_layer_norm", "ln_f", "layernorm", "post_layernorm")
# CLIP's vision tower has a post_layernorm that only its class token goes through.
_WITHOUT_FINAL_NORM = ("clip_vision_model",)


@dataclass(frozen=True)
class Backbone:
    """A model and the parts of it that exits are taken from.

    Attributes:
        model: the whole backbone.
        layers: its layers in the order they run.
        path: where the layers stand in it.
        final_norm: the norm behind the last layer, or None.
        widths: features of the hidden states, of the embedding output and behind every layer.
    """

    model: nn.Module
    layers: nn.ModuleList
    path: str
    final_norm: nn.Module | None
    widths: tuple[int, ...]

    @property
    def hidden_size(self) -> int:
        """Features behind the last layer."""
        return self.widths[-1]


def find_backbone(model: nn.Module, layers: str | None = None) -> Backbone:
    """The layers of a model, found by its configuration, or at the attribute path `layers`.

    Raises:
        ValueError: no list of layers is there.
    """
    config = getattr(model, "config", None)
    depth = getattr(config, "num_hidden_layers", getattr(config, "num_encoder_blocks", None))
    if layers is None:
        path = next((name for name, module in model.named_modules() if _is_stack(module, depth)), None)
        if path is None:
            wanted = "a config with num_hidden_layers" if depth is None else f"a ModuleList of its {depth} layers"
            raise ValueError(
                f"model must have {wanted}, and {type(model).__name__} has none: pass layers='...', the attribute path "
                "of the list of layers, such as 'encoder.layer'"
            )
    else:
        path = layers
        modules = dict(model.named_modules())
        if not isinstance(modules.get(path), nn.ModuleList):
            raise ValueError(
                f"layers must be the attribute path of a ModuleList of the model, got {path!r}; it has "
                f"{', '.join(name for name, module in modules.items() if isinstance(module, nn.ModuleList)) or 'none'}"
            )
    stack = model.get_submodule(path)
    assert isinstance(stack, nn.ModuleList)
    return Backbone(model, stack, path, _find_final_norm(model, path), _find_widths(model, len(stack)))


def _find_widths(model: nn.Module, depth: int) -> tuple[int, ...]:
    config = getattr(model, "config", None)
    if isinstance(width := getattr(config, "hidden_size", None), int):
        return (width,) * (depth + 1)
    widths = getattr(config, "hidden_sizes", ())
    if len(widths) != depth:
        raise ValueError(f"model must have config.hidden_size, and {type(model).__name__} has not")
    # A hierarchy of stages, each with an embedding of its own; the first takes the image.
    return (config.num_channels, *widths)  # type: ignore[union-attr]


def _is_stack(module: nn.Module, depth: int | None) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == depth and len({type(layer) for layer in module}) == 1


def _find_final_norm(model: nn.Module, path: str) -> nn.Module | None:
    """Beside the list of layers, or beside what holds it."""
    if getattr(getattr(model, "config", None), "model_type", None) in _WITHOUT_FINAL_NORM:
        return None
    while path:
        path = path.rpartition(".")[0]
        owner = model.get_submodule(path)
        for name in _FINAL_NORMS:
            if (norm := owner._modules.get(name)) is not None:
                return norm
    return None


class _Stop(BaseException):
    """Ends a forward pass whose remaining layers nobody asked for. No Exception, so that no model catches it."""


def stream_layers(
    backbone: Backbone, inputs: Mapping[str, Any], last: int, receive: Callable[[int, Tensor], None]
) -> None:
    """Run a backbone up to a layer and hand over every hidden state on the way, keeping none.

    Args:
        backbone: what to run.
        inputs: keyword arguments of its forward.
        last: the layer after which to stop; 0 for the embedding output.
        receive: called with (0, embedding output), (1, output of the first layer) and so on, before any final norm.
    """

    def receive_and_stop(layer: int, hidden: Tensor) -> None:
        receive(layer, hidden)
        if layer == last:
            raise _Stop

    try:
        with watch_layers(backbone, last, receive_and_stop):
            backbone.model(**inputs)
    except _Stop:
        return
    raise RuntimeError(f"{type(backbone.model).__name__} ended without running layer {last} of {backbone.path}")


@contextmanager
def watch_layers(backbone: Backbone, last: int, receive: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Hand over the hidden states of every forward pass inside the `with` block, up to those of the layer `last`.

    The hooks see every thread that runs the model, and serve this one.
    """
    owner = threading.get_ident()

    def hand_over(layer: int, hidden: Any) -> None:
        if threading.get_ident() == owner:
            receive(layer, _tokens(hidden if isinstance(hidden, Tensor) else hidden[0]))

    def before_first(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hand_over(0, args[0] if args else kwargs["hidden_states"])

    def after(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _args, output: hand_over(layer, output)

    handles = [backbone.layers[0].register_forward_pre_hook(before_first, with_kwargs=True)]
    handles += [backbone.layers[layer - 1].register_forward_hook(after(layer)) for layer in range(1, last + 1)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tokens(hidden: Tensor) -> Tensor:
    """[B, T, D]; of a feature map [B, D, H, W] its places, row by row."""
    return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden
