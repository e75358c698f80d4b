"""Attention pooling heads of other libraries' models that `nn.LatentAttentionPooling` computes."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.latent import LatentAttentionPooling
from ..nn.latent.layer import mult_of
from .activations import epilogue_of
from .surgery import is_replacement, places

# By class name, so that neither transformers nor a model's own code need be imported.
_SIGLIP_HEADS = ("SiglipMultiheadAttentionPoolingHead", "Siglip2MultiheadAttentionPoolingHead")
_NV_EMBED_HEAD = "LatentAttentionModel"
_SIGLIP_ACTIVATIONS = ("gelu", "gelu_tanh")


@dataclass(frozen=True)
class AttentionHead:
    """A head in a model and what can stand in its place.

    Attributes:
        parent, name: the module that holds it, and as what.
        path: its full name in the model.
        kind: for the report.
        original: the head.
        pooling: the module that computes it, with the same parameters.
        replacement: what takes the head's place: `pooling`, or a module around it that is called as the head is.
    """

    parent: nn.Module
    name: str
    path: str
    kind: str
    original: nn.Module
    pooling: LatentAttentionPooling
    replacement: nn.Module


def find_attention_heads(model: nn.Module) -> Iterator[AttentionHead]:
    """Every SigLIP pooling head and every latent attention of NV-Embed in a model.

    Raises:
        ValueError: a module of NV-Embed's class whose tensors are not NV-Embed's; the message names them.
    """
    for parent, name, path, child in places(model):
        if not all(type(parameter) is nn.Parameter for parameter in child.parameters()):  # a subclass may be quantised
            continue
        if type(child).__name__ in _SIGLIP_HEADS and (head := _siglip_head(child)) is not None:
            yield AttentionHead(parent, name, path, "attention pooling", child, head, head)
        elif type(child).__name__ == _NV_EMBED_HEAD:
            latent = _nv_embed_head(child, path)
            yield AttentionHead(parent, name, path, "latent attention", child, latent, LatentAttention(latent))


def replaced_heads(model: nn.Module) -> Iterator[tuple[str, LatentAttentionPooling]]:
    """The full name and the pooling of every head of a model that was replaced."""
    for name, module in model.named_modules(remove_duplicate=False):
        if is_replacement(module) and isinstance(module, LatentAttentionPooling | LatentAttention):
            yield name, module if isinstance(module, LatentAttentionPooling) else module.pooling


class LatentAttention(nn.Module):
    """NV-Embed's `latent_attention_model`, called as it is: pooled where a mask is given, else token by token."""

    def __init__(self, pooling: LatentAttentionPooling) -> None:
        super().__init__()
        self.pooling = pooling

    def forward(self, hiddens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is not None:
            pooled: Tensor = self.pooling(hiddens, attention_mask)
            return pooled
        every_token = copy.copy(self.pooling)  # the parameters are the same
        every_token.reduce, every_token.normalize = "all", False
        tokens: Tensor = every_token(hiddens)
        return tokens


def _siglip_head(head: Any) -> LatentAttentionPooling | None:
    """One probe that attends to the patches, and a feed-forward; None where its activation is none of ours."""
    attention, feed_forward = head.attention, head.mlp
    activation = epilogue_of(feed_forward.activation_fn)
    if activation not in _SIGLIP_ACTIVATIONS:
        return None
    hidden, dim = feed_forward.fc1.weight.shape
    with torch.device("meta"):
        pooling = LatentAttentionPooling(
            dim,
            latents=1,
            heads=attention.num_heads,
            direction="latents_q",
            qkv_bias=True,
            out_bias=True,
            norm_q=False,
            norm_kv=False,
            residual="none",
            ffn=activation,
            mult=mult_of(hidden, dim),
            reduce="first",
            normalize=False,
            eps=head.layernorm.eps,
        )
    state = {"latents": head.probe[0]}
    for projection, weight, bias in zip(
        ("to_q", "to_k", "to_v"), attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True
    ):
        state |= {f"layers.0.{projection}.weight": weight, f"layers.0.{projection}.bias": bias}
    for ours, theirs in (
        ("to_out", attention.out_proj),
        ("norm_ffn", head.layernorm),
        ("ffn_in", feed_forward.fc1),
        ("ffn_out", feed_forward.fc2),
    ):
        state |= {f"layers.0.{ours}.weight": theirs.weight, f"layers.0.{ours}.bias": theirs.bias}
    return _with_tensors_of(head, pooling, state)


def _nv_embed_head(head: Any, path: str) -> LatentAttentionPooling:
    state = head.state_dict()
    heads = getattr(head.cross_attend_blocks[0].fn, "heads", 8)
    try:
        pooling = LatentAttentionPooling.from_nv_embed(state, heads, bool(getattr(head, "output_normalize", True)))
    except ValueError as error:
        raise ValueError(f"{path} cannot be replaced: {error}; the model is left as it was") from error
    return pooling.requires_grad_(any(parameter.requires_grad for parameter in head.parameters())).train(head.training)


def _with_tensors_of(
    head: nn.Module, pooling: LatentAttentionPooling, state: dict[str, Tensor]
) -> LatentAttentionPooling:
    """The pooling with a head's own tensors, not copies."""
    pooling.load_state_dict({name: tensor.detach() for name, tensor in state.items()}, assign=True)
    trainable = any(parameter.requires_grad for parameter in head.parameters())
    return pooling.requires_grad_(trainable).train(head.training)
