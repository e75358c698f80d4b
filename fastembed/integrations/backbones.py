"""The layers of a transformers backbone, and its hidden states while it runs."""

import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from typing import Any

from torch import Tensor, nn

# What architectures call the norm behind their last layer, for those whose code cannot be read.
_FINAL_NORMS = ("norm", "final_norm", "final_layer_norm", "ln_f", "layernorm", "post_layernorm")
# CLIP's vision tower has a post_layernorm that only its class token goes through.
_WITHOUT_FINAL_NORM = ("clip_vision_model",)
# Architectures whose layers hand on [T, B, D].
_TOKENS_FIRST = ("xlnet",)


@dataclass(frozen=True)
class Backbone:
    """A model and the parts of it that exits are taken from.

    Attributes:
        model: the whole backbone.
        layers: its layers in the order they run; one that runs several times (ALBERT's) stands there as often.
        path: where the list of layers stands in it.
        final_norm: the norm behind the last layer, or None.
        widths: features of the hidden states, of the embedding output and behind every layer.
    """

    model: nn.Module
    layers: tuple[nn.Module, ...]
    path: str
    final_norm: nn.Module | None
    widths: tuple[int, ...]

    @property
    def hidden_size(self) -> int:
        """Features behind the last layer."""
        return self.widths[-1]

    @property
    def shares_layers(self) -> bool:
        return len(set(self.layers)) < len(self.layers)


def find_backbone(model: nn.Module, layers: str | None = None) -> Backbone:
    """The layers of a model, found by its configuration, or at the attribute path `layers`.

    Raises:
        ValueError: no list of layers is there, or several stand side by side.
    """
    model = getattr(model, "_orig_mod", model)  # of what torch.compile made, whose layers nobody can watch
    config = getattr(model, "config", None)
    depth = _depth(model)
    # ALBERT's layers run in groups that share their weights.
    modules = getattr(config, "num_hidden_groups", depth)
    path = _find_path(model, depth, modules) if layers is None else layers
    stack = dict(model.named_modules()).get(path)
    if not isinstance(stack, nn.ModuleList) or not len(stack):
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        raise ValueError(
            f"layers must be the attribute path of a ModuleList of the model, got {path!r}; it has "
            f"{', '.join(lists) or 'none'}"
        )
    in_order = tuple(stack)
    if depth is not None and len(stack) == modules != depth:
        in_order = tuple(stack[int(layer / (depth / modules))] for layer in range(depth))
    return Backbone(model, in_order, path, _find_final_norm(model, path), _find_widths(model, len(in_order)))


def _depth(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    return getattr(config, "num_hidden_layers", getattr(config, "num_encoder_blocks", None))


def _find_path(model: nn.Module, depth: int | None, modules: int | None) -> str:
    """Where the first list of so many modules stands."""
    name = type(model).__name__
    if depth is None:
        parts = [f"{part} ({type(module).__name__})" for part, module in model.named_children() if _depth(module)]
        advice = f"pass one of its parts: {', '.join(parts)}" if parts else _PASS_LAYERS
        raise ValueError(f"model must have a config with num_hidden_layers, and {name} has none: {advice}")
    path = next((path for path, module in model.named_modules() if _is_stack(module, modules)), None)
    if path is None:
        raise ValueError(f"model must have a ModuleList of its {depth} layers, and {name} has none: {_PASS_LAYERS}")
    # XLM keeps attentions, norms and feed-forwards in lists of their own: none of them is of whole layers.
    parent = path.rpartition(".")[0]
    beside = [part for part, module in model.get_submodule(parent).named_children() if _is_stack(module, modules)]
    if len(beside) > 1:
        raise ValueError(
            f"model must have one ModuleList of its {depth} layers, and {name} has several side by side, perhaps each "
            f"of a part of every layer ({', '.join(beside)}): {_PASS_LAYERS}"
        )
    return path


_PASS_LAYERS = "pass layers='...', the attribute path of the list of layers, such as 'encoder.layer'"


def _find_widths(model: nn.Module, depth: int) -> tuple[int, ...]:
    config = getattr(model, "config", None)
    if isinstance(width := getattr(config, "hidden_size", None), int):
        return (width,) * (depth + 1)
    widths = getattr(config, "hidden_sizes", ())
    if len(widths) != depth:
        raise ValueError(f"model must have config.hidden_size, and {type(model).__name__} has not")
    # A hierarchy of stages, each with an embedding of its own; the first takes the image.
    return (config.num_channels, *widths)  # type: ignore[union-attr]


def _is_stack(module: nn.Module, modules: int | None) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == modules and len({type(layer) for layer in module}) == 1


def _find_final_norm(model: nn.Module, path: str) -> nn.Module | None:
    """The norm that what holds the list of layers, or what holds that, calls once they have run."""
    if getattr(getattr(model, "config", None), "model_type", None) in _WITHOUT_FINAL_NORM:
        return None
    # Without a head for some task, which may have norms of its own. DINOv3's own encoder has the name of a base model.
    whole = model if type(model).__name__.endswith("Model") else getattr(model, "base_model", model)
    owner = None
    while path and owner is not whole:
        path, _, name = path.rpartition(".")
        owner = model.get_submodule(path)
        for called in _called_after(type(owner).forward, name):
            norm = owner._modules.get(called)
            if norm is not None and "norm" in type(norm).__name__.lower():
                return norm
    return None


@cache
def _called_after(forward: Callable[..., Any], name: str) -> tuple[str, ...]:
    """The modules that a forward calls after the last mention of its child `name`."""
    try:
        *_, after = re.split(rf"\bself\.{name}\b", inspect.getsource(forward))
    except (OSError, TypeError):  # no source to read
        return _FINAL_NORMS
    return tuple(re.findall(r"\bself\.(\w+)\(", after))


_watched: ContextVar[bool] = ContextVar("watched", default=False)


def is_watched() -> bool:
    """Whether this thread's forward passes are watched, so that whole batches have to go through every layer."""
    return _watched.get()


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
            # What torch.compile made of the model would run without the hooks.
            backbone.model._call_impl(**inputs)
    except _Stop:
        return
    raise RuntimeError(
        f"{type(backbone.model).__name__} ended without running layer {last} of {backbone.path}: of a model that "
        "torch.compile runs, only single layers may be compiled"
    )


@contextmanager
def watch_layers(backbone: Backbone, last: int, receive: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Hand over the hidden states of every forward pass inside the `with` block, up to those of the layer `last`.

    The hooks see every thread that runs the model, and serve this one.
    """
    owner = threading.get_ident()
    tokens_first = getattr(getattr(backbone.model, "config", None), "model_type", None) in _TOKENS_FIRST

    def hand_over(layer: int, hidden: Any) -> None:
        if layer <= last:
            hidden = hidden if isinstance(hidden, Tensor) else hidden[0]
            receive(layer, hidden.transpose(0, 1) if tokens_first else _tokens(hidden))

    def hooks(module: nn.Module) -> tuple[Callable[..., None], Callable[..., None]]:
        turns = cycle([layer for layer, other in enumerate(backbone.layers, start=1) if other is module])
        layer = 0

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal layer
            if threading.get_ident() == owner:
                layer = next(turns)
                if layer == 1:
                    hand_over(0, args[0] if args else kwargs["hidden_states"])

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            if threading.get_ident() == owner:
                hand_over(layer, output)

        return before, after

    handles = []
    for module in dict.fromkeys(backbone.layers[: max(1, last)]):
        before, after = hooks(module)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    token = _watched.set(True)
    try:
        yield
    finally:
        _watched.reset(token)
        for handle in handles:
            handle.remove()


def _tokens(hidden: Tensor) -> Tensor:
    """[B, T, D]; of a feature map [B, D, H, W] its places, row by row."""
    return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden
