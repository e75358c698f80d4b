"""LatentAttentionPooling, the module: its settings and inputs, and when its folded weights are made and given up."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._checks import check_integer
from ...ops._pooling_checks import flat_mask
from ...ops._registry import in_forward_mode
from . import arithmetic, latents_as_queries, tokens_as_queries
from .folding import fold_block, fold_queries
from .layer import Layer, mult_of
from .nv_embed import read_checkpoint
from .tokens_as_queries import Tokens

SCALES = ("head", "model")
RESIDUALS = ("q_in", "q_proj", "none")
FEED_FORWARDS = ("geglu", "gelu", "gelu_tanh", "relu1", None)
REDUCTIONS = {"tokens_q": ("masked_mean", "all"), "latents_q": tuple(latents_as_queries.REDUCTIONS)}


class LatentAttentionPooling(nn.Module):
    """Pools hidden states by attention between tokens and trained latents.

    The defaults are NV-Embed's (arXiv 2405.17428, as its code has it): tokens attend to the latents, go through a
    feed-forward with a GELU gate, and are averaged. `from_nv_embed` builds one from a checkpoint. Other settings give
    the pooling by multi-head attention of the Set Transformer, SigLIP's head, the Perceiver resampler and timm's
    AttentionPoolLatent; docs/kernels/latent.md lists them.

    In evaluation mode without gradients, everything that does not depend on the input is folded into few matrices
    (`arithmetic` says what that saves), once, at the first forward pass; training, loading a state dict, moving the
    module or changing a parameter undoes it. The fold is exact; where it would not pay for the module's sizes, keys
    and values of the latents are kept instead. The parameters stay, and are what is saved.

    Args:
        dim: D, of hidden states and latents.
        latents: L, how many.
        heads, head_dim: of the attention; head_dim defaults to dim // heads.
        direction: "tokens_q", tokens are the queries; "latents_q", latents are.
        scale: of the scores: "head", 1 / sqrt(head_dim), or "model", 1 / sqrt(dim).
        qkv_bias, out_proj, out_bias: of the projections.
        norm_q, norm_kv: LayerNorm on what is projected to queries, and to keys and values.
        qk_norm: LayerNorm per head on queries and keys.
        concat_latents: latents_q only: latents attend to the tokens and the latents.
        residual: what is added to the attention's output: "q_in", what was projected to queries; "q_proj", the queries;
            "none".
        ffn: "geglu", "gelu", "gelu_tanh", "relu1" (one matrix), or None.
        mult: hidden features of the feed-forward, per dim.
        ffn_bias, norm_ffn: of the feed-forward; norm_ffn is a LayerNorm before it.
        ln_after: LayerNorm after the attention and after the feed-forward.
        depth: how many layers; tokens_q has one.
        norm_final: LayerNorm on the result of the last layer.
        reduce: tokens_q: "masked_mean" or "all"; latents_q: "first", "mean_latents", "flatten" or "all".
        normalize: whether the result is divided by its L2 norm.
        eps: of the LayerNorms.

    Shapes:
        hidden_states: [B, T, D] in any floating dtype. attention_mask: [B, T], nonzero for the tokens to pool, or
            [B, 1, 1, T] as `pool_exits` takes it.
        Returns: [B, D] in the dtype of hidden_states; [B, T, D] or [B, L, D] with "all", [B, L * D] with "flatten".

    A row whose mask is all zeros gives zeros. A NaN or infinite hidden state makes its own sequence NaN and no other;
    where the mask is zero it is never read.

    Raises:
        ValueError, TypeError: a setting or an input is not as above; the message names it.
    """

    latents: nn.Parameter

    def __init__(
        self,
        dim: int,
        latents: int = 512,
        heads: int = 8,
        head_dim: int | None = None,
        *,
        direction: str = "tokens_q",
        scale: str = "head",
        qkv_bias: bool = False,
        out_proj: bool = True,
        out_bias: bool = False,
        norm_q: bool = True,
        norm_kv: bool = True,
        qk_norm: bool = False,
        concat_latents: bool = False,
        residual: str = "q_in",
        ffn: str | None = "geglu",
        mult: float = 4,
        ffn_bias: bool = True,
        norm_ffn: bool = True,
        ln_after: bool = False,
        depth: int = 1,
        norm_final: bool = False,
        reduce: str = "masked_mean",
        normalize: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("latents", latents), ("heads", heads), ("depth", depth)):
            check_integer(name, size, 1)
        if head_dim is not None:
            check_integer("head_dim", head_dim, 1)
        _check_choice("direction", direction, tuple(REDUCTIONS))
        _check_choice("scale", scale, SCALES)
        _check_choice("residual", residual, RESIDUALS)
        _check_choice("ffn", ffn, FEED_FORWARDS)
        _check_choice(f"reduce of {direction}", reduce, REDUCTIONS[direction])
        if head_dim is None:
            if dim % heads:
                raise ValueError(f"heads must divide dim {dim} where head_dim is not given, got {heads}")
            head_dim = dim // heads
        if heads * head_dim != dim and (not out_proj or residual == "q_proj"):
            raise ValueError(f"heads * head_dim must be dim {dim} for this residual or without out_proj")
        if direction == "tokens_q" and (depth > 1 or concat_latents or ln_after):
            raise ValueError("depth > 1, concat_latents and ln_after need direction='latents_q'")
        self.dim, self.heads, self.head_dim = dim, heads, head_dim
        self.direction, self.reduce, self.normalize, self.eps = direction, reduce, normalize, eps
        self.concat_latents, self.qk_norm = concat_latents, qk_norm
        self.latents = nn.Parameter(torch.randn(latents, dim))
        self.layers = nn.ModuleList(
            Layer(
                dim,
                heads,
                head_dim,
                scale=scale,
                qkv_bias=qkv_bias,
                out_proj=out_proj,
                out_bias=out_bias,
                norm_q=norm_q,
                norm_kv=norm_kv,
                qk_norm=qk_norm,
                residual=residual,
                ffn=ffn,
                ffn_dim=int(mult * dim),
                ffn_bias=ffn_bias,
                norm_ffn=norm_ffn,
                ln_after=ln_after,
                eps=eps,
            )
            for _ in range(depth)
        )
        self.norm_final = nn.LayerNorm(dim, eps=eps) if norm_final else nn.Identity()
        self.ffn_bits: int | None = None
        # What was made from the parameters: folded weights, or keys and values of the latents; and from which.
        self._folded: Any = None
        self._folded_from: tuple[Any, ...] = ()

    @classmethod
    def from_nv_embed(
        cls, state_dict: Mapping[str, Tensor], heads: int = 8, normalize: bool = True
    ) -> "LatentAttentionPooling":
        """The pooling of an NV-Embed checkpoint (v1 or v2), in evaluation mode, in the checkpoint's dtype.

        Args:
            state_dict: the checkpoint, or its part under `latent_attention_model.`, with or without that prefix. Of a
                whole checkpoint the other tensors are left alone. The tensors are kept, not copied, except that keys
                and values become two views of one.
            heads: of the cross-attention; its per-head size follows from the shapes.
            normalize: the model's output_normalize.

        Raises:
            TypeError: something else than a dict of tensors by name.
            ValueError: tensors are missing, unknown, not floating point or of a wrong shape; one message names them
                all. Or a number of heads that does not divide theirs.
        """
        sizes, parameters = read_checkpoint(state_dict, heads)
        with torch.device("meta"):
            module = cls(
                sizes["dim"],
                sizes["latents"],
                heads,
                sizes["inner"] // heads,
                mult=mult_of(sizes["hidden"], sizes["dim"]),
                normalize=normalize,
            )
        module.load_state_dict({name: tensor.detach() for name, tensor in parameters.items()}, assign=True)
        return module.requires_grad_(True).eval()

    # ---- forward -----------------------------------------------------------------------------------------------------

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Pool; see the class for shapes."""
        keep = self._check(hidden_states, attention_mask)
        if self.direction == "latents_q":
            pooled = self._pool_by_latents(hidden_states, None if attention_mask is None else keep)
        elif self.reduce == "all":
            return self._every_token(hidden_states, keep).to(hidden_states.dtype)
        else:
            # Without a mask the number of tokens is known from the shape, which torch.compile(fullgraph=True) needs.
            rows = hidden_states.flatten(0, 1) if attention_mask is None else hidden_states[keep]
            pooled = self._pool_tokens(Tokens(rows, F.pad(keep.sum(dim=1).cumsum(0), (1, 0))))
        if self.normalize:
            pooled = F.normalize(pooled, dim=-1)
        return pooled.to(hidden_states.dtype)

    def _check(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        for name, tensor in (("hidden_states", hidden_states), ("attention_mask", attention_mask)):
            if tensor is not None and not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.dim:
            raise ValueError(
                f"hidden_states must have shape [batch, tokens, {self.dim}], got {list(hidden_states.shape)}"
            )
        if not hidden_states.is_floating_point():
            raise TypeError(f"hidden_states must be floating point, got {hidden_states.dtype}")
        if attention_mask is None:
            return hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool)
        attention_mask = flat_mask(attention_mask)
        if attention_mask.shape != hidden_states.shape[:2]:
            expected, got = list(hidden_states.shape[:2]), list(attention_mask.shape)
            raise ValueError(f"attention_mask must have shape {expected}, as hidden_states, got {got}")
        return attention_mask != 0

    def _pool_tokens(self, tokens: Tokens) -> Tensor:
        """[B, D], the means of z, not yet normalised."""
        layer = self._layer(0)
        folded = self._fold_if_it_pays(tokens.rows)
        if folded is None:
            means = tokens_as_queries.means_by_tiles(layer, tokens, *self._keys_values(layer))
            pooled = tokens_as_queries.past_the_mean(layer.ffn_out, *means)
        else:
            # The fold's dtype was chosen by the parameters'; autocast would change that of some products only.
            with torch.autocast(tokens.rows.device.type, enabled=False):
                pooled = tokens_as_queries.past_the_mean(layer.ffn_out, *tokens_as_queries.means_folded(tokens, folded))
        # Also the bias of the last matrix must not reach a row without tokens.
        return pooled.masked_fill(tokens.cu_seqlens.diff()[:, None] == 0, 0)

    def _every_token(self, hidden_states: Tensor, keep: Tensor) -> Tensor:
        layer = self._layer(0)
        rows = torch.where(keep[..., None], hidden_states, 0).to(self.latents.dtype)
        z = layer.feed_forward(layer.attention(rows, *self._keys_values(layer)))
        return F.normalize(z, dim=-1) if self.normalize else z

    def _pool_by_latents(self, hidden_states: Tensor, keep: Tensor | None) -> Tensor:
        folded = self._fold_if_it_pays(hidden_states)
        if folded is None or not len(hidden_states):
            layers = map(self._layer, range(len(self.layers)))
            latents = latents_as_queries.attend(layers, self.latents, hidden_states, keep, self.concat_latents)
        else:
            latents = latents_as_queries.attend_folded(self._layer(0), self.latents, hidden_states, keep, folded)
        reduced = latents_as_queries.REDUCTIONS[self.reduce](self.norm_final(latents))
        if keep is None:
            return reduced if hidden_states.shape[1] else torch.zeros_like(reduced)
        empty = ~keep.any(dim=1)
        return reduced.masked_fill(empty.reshape(-1, *[1] * (reduced.dim() - 1)), 0)

    # ---- folding -----------------------------------------------------------------------------------------------------

    def folds(self) -> bool:
        """Whether inference folds: whether it can for these settings, and is less arithmetic for these sizes."""
        if self.qk_norm or len(self.layers) > 1:
            return False
        if self.direction == "latents_q":
            return not self.concat_latents and arithmetic.latents_fold(self._layer(0), len(self.latents))
        return self.reduce == "masked_mean" and arithmetic.tokens_fold(self._layer(0), len(self.latents))

    def quantize(self, bits: int | None = 8) -> "LatentAttentionPooling":
        """Have inference use int8 products for the feed-forward's first matrix, with weights of 1 to 8 bits.

        Affects inference on the CPU where the module folds; the parameters stay as they are. None undoes it.

        Raises:
            TypeError, ValueError: bits is none of these, or the module does not fold (see `folds`).
        """
        if bits is not None:
            check_integer("bits", bits, 1, 8)
        if bits is not None and not (self.folds() and self.direction == "tokens_q"):
            raise ValueError("only a block that folds, with tokens as queries, can be quantised")
        self.ffn_bits = bits
        self._unfold()
        return self

    def fold(self) -> "LatentAttentionPooling":
        """Fold now, instead of at the next forward pass in evaluation mode; nothing where `folds` is False."""
        if self.folds():
            layer = self._layer(0)
            with torch.no_grad():
                self._keep(
                    fold_queries(layer, self.latents)
                    if self.direction == "latents_q"
                    else fold_block(layer, self.latents, self.ffn_bits)
                )
        return self

    def arithmetic(self, tokens: int, sequences: int = 1) -> dict[str, float]:
        """Floating-point operations (a multiplication and an addition are two) for so many kept tokens in all.

        Returns: "released", as the model's own code computes, with keys and values of the latents for every sequence;
        "cached", with these computed once; "folded", as inference here computes: after every exact fold, or, where the
        module does not fold, after moving the last matrix past the mean. Matrix products only.
        """
        check_integer("tokens", tokens, 0)
        check_integer("sequences", sequences, 1)
        layer, latents, folds = self._layer(0), len(self.latents), self.folds()
        if self.direction == "tokens_q":
            multiplications = arithmetic.operations_of_tokens(layer, latents, tokens, sequences, folds)
        else:
            depth = len(self.layers)
            multiplications = arithmetic.operations_of_latents(layer, depth, latents, tokens, sequences, folds)
        return {name: 2.0 * count for name, count in multiplications.items()}

    def _fold_if_it_pays(self, hidden_states: Tensor) -> Any:
        """The folded weights, or None where this forward pass has to use the parameters."""
        if self.training or self._needs_grad(hidden_states) or not self.folds():
            return None
        if not torch.compiler.is_compiling() and not self._is_kept():
            self.fold()
        return self._folded

    def _keys_values(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Keys and values of the latents [H, L, d_h]; between forward passes in evaluation mode they are kept."""
        if self.training or self._needs_grad() or torch.compiler.is_compiling() or self.folds():
            return layer.keys_values(self.latents)
        if not self._is_kept():
            self._keep(layer.keys_values(self.latents))
        return self._folded

    def _needs_grad(self, *inputs: Tensor) -> bool:
        """Of the parameters or the inputs, in either mode: the folded weights' kernels know no tangents."""
        if in_forward_mode():
            return True
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, *self.parameters()))

    def _keep(self, made: Any) -> None:
        self._folded, self._folded_from = made, self._state()

    def _is_kept(self) -> bool:
        return self._folded is not None and self._folded_from == self._state()

    def _state(self) -> tuple[Any, ...]:
        """What tells that a parameter was replaced or changed in place."""
        return tuple(
            (id(parameter), parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version)
            for parameter in self.parameters()
        )

    def _unfold(self) -> None:
        self._folded, self._folded_from = None, ()

    def _layer(self, index: int) -> Layer:
        layer = self.layers[index]
        assert isinstance(layer, Layer)
        return layer

    # ---- nn.Module ---------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> "LatentAttentionPooling":
        if mode:
            self._unfold()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._unfold()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._unfold()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folded": None, "_folded_from": ()}

    def extra_repr(self) -> str:
        sizes = f"dim={self.dim}, latents={len(self.latents)}, heads={self.heads}, head_dim={self.head_dim}"
        return f"{sizes}, direction={self.direction!r}, reduce={self.reduce!r}, normalize={self.normalize}"


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
