"""Exits and SentenceTransformers: what a MultiExitEncoder takes over from one, and one exit as one."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from torch import nn

from .backbones import Backbone
from .batches import Tokenizer
from .sentence_transformers import MODES, FusedPooling, renamed
from .surgery import Absorbed, is_changed


@dataclass(frozen=True)
class Pipeline:
    """What a SentenceTransformer does: the parts of a MultiExitEncoder."""

    model: nn.Module
    tokenizer: Any
    max_length: int | None
    mode: str | tuple[str, ...]
    normalize: bool
    include_prompt: bool
    prompts: Mapping[str, str]
    default_prompt_name: str | None


def read_pipeline(model: SentenceTransformer) -> Pipeline:
    """Take a SentenceTransformer of a Transformer, a Pooling and perhaps a Normalize apart.

    Raises:
        ValueError: it is made of other modules.
    """
    transformer, *rest = model
    poolings = [module for module in rest if isinstance(module, Pooling)]
    others = [module for module in rest if not isinstance(module, (Pooling, Normalize, Absorbed))]
    if not isinstance(transformer, Transformer) or len(poolings) != 1 or others:
        raise ValueError(
            "model must be a SentenceTransformer of a Transformer, a Pooling and perhaps a Normalize, got "
            f"{', '.join(type(module).__name__ for module in model)}: pass its transformers model, tokenizer and heads"
        )
    (pooling,) = poolings
    normalizes = any(isinstance(module, Normalize) for module in rest)
    return Pipeline(
        transformer.auto_model,
        model.tokenizer,
        model.max_seq_length,
        renamed(pooling.pooling_mode, MODES),
        normalizes or (isinstance(pooling, FusedPooling) and pooling.normalize),
        pooling.include_prompt,
        {name: prompt for name, prompt in model.prompts.items() if prompt},
        model.default_prompt_name,
    )


def exit_model(
    backbone: Backbone,
    exit: tuple[int, int],
    tokenizer: Tokenizer,
    head: nn.Module | None,
    mode: str | Sequence[str],
    normalize: bool,
    include_prompt: bool,
    prompts: Mapping[str, str],
    default_prompt_name: str | None,
) -> SentenceTransformer:
    """A SentenceTransformer of the layers up to an exit, sharing their parameters.

    Raises:
        ValueError: the model is swapped; the head is no nn.Linear, which is the one kind that saves; or layers share
            their weights in several groups (ALBERT), which depend on how many layers there are.
    """
    layer, dim = exit
    if is_changed(backbone.model):
        raise ValueError("model must not be swapped, because what is saved is the original: unswap it first")
    if backbone.shares_layers and len(set(backbone.layers)) > 1:
        raise ValueError(
            f"model must have layers that all share their weights, or none, to be cut off at exit {exit}, and "
            f"{type(backbone.model).__name__} shares them in {len(set(backbone.layers))} groups"
        )
    if head is not None and not isinstance(head, nn.Linear):
        raise ValueError(f"heads must be nn.Linear to be saved, got a {type(head).__name__} for layer {layer}")
    model = _cut_off(backbone, layer)
    with TemporaryDirectory() as folder:  # a Transformer is only made from files
        model.save_pretrained(folder)
        _save_tokenizer(tokenizer.tokenizer, folder)
        transformer = Transformer(folder, max_seq_length=tokenizer.max_length)
    transformer.model = model
    names = {ours: theirs for theirs, ours in MODES.items()}
    modules: list[nn.Module] = [
        transformer,
        Pooling(backbone.hidden_size, renamed(mode, names), include_prompt=include_prompt),
    ]
    width = backbone.hidden_size * (1 if isinstance(mode, str) else len(mode))
    if head is not None or dim < width:
        modules.append(_projection(head, dim, width))
    if normalize:
        modules.append(Normalize())
    device = next(model.parameters()).device
    whole = SentenceTransformer(
        modules=modules, prompts=dict(prompts), default_prompt_name=default_prompt_name, device=str(device)
    )
    return whole.train(model.training)


def _save_tokenizer(tokenizer: Any, folder: str) -> None:
    """With the side that it pads now: by itself it saves the one it was made with."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side
    tokenizer.save_pretrained(folder)


def _projection(head: nn.Linear | None, dim: int, width: int) -> Dense:
    """The head's first `dim` features; without a head, the first `dim` of the pooled vector, by rows of the identity.

    SentenceTransformer's own truncate_dim comes after its Normalize, and leaves vectors shorter than 1.
    """
    dense = Dense(width, dim, bias=head is not None and head.bias is not None, activation_function=nn.Identity())
    with torch.no_grad():
        dense.linear.weight.copy_(torch.eye(dim, width) if head is None else head.weight[:dim])
        if head is not None and head.bias is not None:
            dense.linear.bias.copy_(head.bias[:dim])
    return dense


def _cut_off(backbone: Backbone, layer: int) -> Any:
    """A copy of the model with the layers after `layer` left out. The tensors are the same, not copies."""
    tensors = [*backbone.model.parameters(), *backbone.model.buffers()]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    if not backbone.shares_layers:
        memo.update({id(dropped): nn.Identity() for dropped in backbone.layers[layer:]})
    model: Any = copy.deepcopy(backbone.model, memo)
    if not backbone.shares_layers:
        parent, _, name = backbone.path.rpartition(".")
        model.get_submodule(parent)._modules[name] = model.get_submodule(backbone.path)[:layer]
    model.config.num_hidden_layers = layer
    if (types := getattr(model.config, "layer_types", None)) is not None:
        model.config.layer_types = types[:layer]
    return model
