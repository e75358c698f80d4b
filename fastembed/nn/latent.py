"""LatentAttentionPooling: NV-Embed's pooling by attention to latents, and its relatives."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .._checks import check_integer
from ..ops import latent as ops
from ..ops._pooling_checks import flat_mask
from ..ops.latent_attention import has_kernels, latent_attention
from ..ops.qmatmul import whole_row
from ..reference import latent as reference
from .linear import QuantLinear

DIRECTIONS = ("tokens_q", "latents_q")
SCALES = ("head", "model")
RESIDUALS = ("q_in", "q_proj", "none")
FEED_FORWARDS = ("geglu", "gelu", "gelu_tanh", "relu1", None)
REDUCTIONS = {"tokens_q": ("masked_mean", "all"), "latents_q": ("first", "mean_latents", "flatten", "all")}

_NV_EMBED_PREFIX = "latent_attention_model."
# Tokens whose activations a training step keeps at a time; the others' are computed again in the backward pass.
_TRAINING_TILE = 512
# Hidden features of the feed-forward that are folded, or multiplied when quantised, together.
_HIDDEN_CHUNK = 2048
# Rows that a matrix product takes in whole blocks of so many round alike, wherever they stand.
_BLOCK_ROWS = 8


class _Layer(nn.Module):
    """Attention and feed-forward. The arguments are those of LatentAttentionPooling."""

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        scale: str,
        qkv_bias: bool,
        out_proj: bool,
        out_bias: bool,
        norm_q: bool,
        norm_kv: bool,
        qk_norm: bool,
        residual: str,
        ffn: str | None,
        ffn_dim: int,
        ffn_bias: bool,
        norm_ffn: bool,
        ln_after: bool,
        eps: float,
    ) -> None:
        super().__init__()
        inner = heads * head_dim

        def norm(wanted: bool, features: int = dim) -> nn.Module:
            return nn.LayerNorm(features, eps=eps) if wanted else nn.Identity()

        self.heads, self.residual, self.ffn = heads, residual, ffn
        self.scale = (head_dim if scale == "head" else dim) ** -0.5
        self.norm_q, self.norm_kv = norm(norm_q), norm(norm_kv)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner, bias=qkv_bias) for _ in range(3))
        self.q_norm, self.k_norm = norm(qk_norm, head_dim), norm(qk_norm, head_dim)
        self.to_out = nn.Linear(inner, dim, bias=out_bias) if out_proj else nn.Identity()
        self.norm_attention = norm(ln_after)
        self.norm_ffn = norm(norm_ffn and ffn is not None)
        hidden = {None: 0, "relu1": dim, "geglu": 2 * ffn_dim}.get(ffn, ffn_dim)
        self.ffn_in = nn.Linear(dim, hidden, bias=ffn_bias) if ffn is not None else nn.Identity()
        two_layers = ffn not in (None, "relu1")
        self.ffn_out = nn.Linear(ffn_dim, dim, bias=ffn_bias) if two_layers else nn.Identity()
        self.norm_output = norm(ln_after)

    def split(self, x: Tensor) -> Tensor:
        """[..., S, H * d_h] to [..., H, S, d_h]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        context = self.norm_kv(context)
        return self.k_norm(self.split(self.to_k(context))), self.split(self.to_v(context))

    def attention(self, rows: Tensor, keys: Tensor, values: Tensor, keep: Tensor | None = None) -> Tensor:
        """Attention of rows [..., S, D] to keys and values [..., H, M, d_h], keep [B, M], with the residual: y."""
        projected = self.to_q(self.norm_q(rows))
        query = self.q_norm(self.split(projected))
        attended = latent_attention(query, keys, values, keep, scale=self.scale)
        return self.after_attention(attended.transpose(-3, -2).flatten(-2), rows, projected)

    def after_attention(self, attended: Tensor, rows: Tensor, projected: Tensor) -> Tensor:
        y = self.to_out(attended)
        if self.residual != "none":
            y = y + (rows if self.residual == "q_in" else projected)
        return self.norm_attention(y)

    def gated(self, y: Tensor) -> Tensor:
        """What the feed-forward's last matrix is given."""
        hidden = self.ffn_in(self.norm_ffn(y))
        if self.ffn == "geglu":
            values, gates = hidden.chunk(2, dim=-1)
            return values * F.gelu(gates)
        if self.ffn == "relu1":
            return F.relu(hidden)
        return F.gelu(hidden, approximate="tanh" if self.ffn == "gelu_tanh" else "none")

    def feed_forward(self, y: Tensor) -> Tensor:
        return y if self.ffn is None else self.norm_output(y + self.ffn_out(self.gated(y)))


@dataclass(frozen=True)
class _Tokens:
    """The tokens that are kept, one sequence after the other."""

    rows: Tensor  # [N, D]
    cu_seqlens: Tensor  # int64 [B + 1]


@dataclass(frozen=True)
class _FoldedBlock:
    """NV-Embed's block as `fastembed.ops.latent.latent_pool` takes it, or with a quantised first matrix."""

    score_weight: Tensor
    score_bias: Tensor
    value_weight: Tensor
    hidden_weight: Tensor | list[QuantLinear]
    hidden_bias: Tensor


@dataclass(frozen=True)
class _FoldedQueries:
    """Latents as queries: scores = LN(x) weight^T, [H * L, D]; values and their bias with the LayerNorm folded in."""

    score_weight: Tensor
    value_weight: Tensor  # [H, d_h, D]
    value_bias: Tensor  # [H * d_h]
    projected: Tensor  # [L, H * d_h], the latents as queries


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
        _check_choice("direction", direction, DIRECTIONS)
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
            _Layer(
                dim,
                heads,
                head_dim,
                scale,
                qkv_bias,
                out_proj,
                out_bias,
                norm_q,
                norm_kv,
                qk_norm,
                residual,
                ffn,
                int(mult * dim),
                ffn_bias,
                norm_ffn,
                ln_after,
                eps,
            )
            for _ in range(depth)
        )
        self.norm_final = nn.LayerNorm(dim, eps=eps) if norm_final else nn.Identity()
        self.ffn_bits: int | None = None
        self._folded: Any = None
        self._folded_from: tuple[Any, ...] = ()

    # ---- NV-Embed ----------------------------------------------------------------------------------------------------

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
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dict of tensors by name, got {type(state_dict).__name__}")
        check_integer("heads", heads, 1)
        tensors = {
            name.removeprefix(_NV_EMBED_PREFIX): tensor
            for name, tensor in state_dict.items()
            if name.startswith(_NV_EMBED_PREFIX) or not any(key.startswith(_NV_EMBED_PREFIX) for key in state_dict)
        }
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"state_dict must be a dict of tensors by name, got {type(tensor).__name__} as {name}")
        attend, feed = "cross_attend_blocks.0", "cross_attend_blocks.1"
        layout = {
            "latents": ("latents", "dim"),
            **{f"{block}.{leaf}": ("dim",) for block in (f"{attend}.norm", f"{attend}.norm_context", f"{feed}.norm")
               for leaf in ("weight", "bias")},
            f"{attend}.fn.to_q.weight": ("inner", "dim"),
            f"{attend}.fn.to_kv.weight": ("2 inner", "dim"),
            f"{attend}.fn.to_out.weight": ("dim", "inner"),
            f"{feed}.fn.net.0.weight": ("2 hidden", "dim"),
            f"{feed}.fn.net.0.bias": ("2 hidden",),
            f"{feed}.fn.net.2.weight": ("dim", "hidden"),
            f"{feed}.fn.net.2.bias": ("dim",),
        }  # fmt: skip
        problems = [f"{name} is missing" for name in layout if name not in tensors]
        problems += [f"{name} is unknown" for name in tensors if name not in layout]
        present = {name: tensors[name] for name in layout if name in tensors}
        sizes = _most_common_sizes(layout, present)
        dtype = Counter(tensor.dtype for tensor in present.values()).most_common(1)[0][0] if present else torch.float32
        for name, tensor in present.items():
            shape = [sizes.get(axis, axis) for axis in layout[name]]
            if list(tensor.shape) != shape:
                problems.append(f"{name} must have shape [{', '.join(map(str, shape))}], got {list(tensor.shape)}")
            if not tensor.is_floating_point():
                problems.append(f"{name} must be floating point, got {tensor.dtype}")
            elif tensor.dtype != dtype:
                problems.append(f"{name} must be {dtype} as the others are, got {tensor.dtype}")
        dim, latents, inner, hidden = (sizes.get(axis, 0) for axis in ("dim", "latents", "inner", "hidden"))
        if not problems and inner % heads:
            problems.append(f"{heads} heads do not divide the {inner} rows of {attend}.fn.to_q.weight")
        if problems:
            raise ValueError("state_dict is not an NV-Embed latent attention: " + "; ".join(problems))
        with torch.device("meta"):
            module = cls(dim, latents, heads, inner // heads, mult=hidden / dim, normalize=normalize)
        key, value = tensors[f"{attend}.fn.to_kv.weight"].chunk(2)
        own = {
            "latents": tensors["latents"],
            "layers.0.to_k.weight": key,
            "layers.0.to_v.weight": value,
            **{f"layers.0.{ours}": tensors[theirs] for ours, theirs in (
                ("norm_q.weight", f"{attend}.norm.weight"),
                ("norm_q.bias", f"{attend}.norm.bias"),
                ("norm_kv.weight", f"{attend}.norm_context.weight"),
                ("norm_kv.bias", f"{attend}.norm_context.bias"),
                ("to_q.weight", f"{attend}.fn.to_q.weight"),
                ("to_out.weight", f"{attend}.fn.to_out.weight"),
                ("norm_ffn.weight", f"{feed}.norm.weight"),
                ("norm_ffn.bias", f"{feed}.norm.bias"),
                ("ffn_in.weight", f"{feed}.fn.net.0.weight"),
                ("ffn_in.bias", f"{feed}.fn.net.0.bias"),
                ("ffn_out.weight", f"{feed}.fn.net.2.weight"),
                ("ffn_out.bias", f"{feed}.fn.net.2.bias"),
            )},
        }  # fmt: skip
        module.load_state_dict({name: tensor.detach() for name, tensor in own.items()}, assign=True)
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
            pooled = self._pool_tokens(_Tokens(rows, F.pad(keep.sum(dim=1).cumsum(0), (1, 0))))
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

    def _pool_tokens(self, tokens: _Tokens) -> Tensor:
        folded = self._fold_if_it_pays(tokens.rows)
        if folded is None:
            means = self._means_by_tiles(tokens)
            pooled = self._past_the_mean(*means)
        else:
            # The fold's dtype was chosen by the parameters'; autocast would change that of some products only.
            with torch.autocast(tokens.rows.device.type, enabled=False):
                pooled = self._past_the_mean(*self._means_folded(tokens, folded))
        # Also the bias of the last matrix must not reach a row without tokens.
        return pooled.masked_fill(tokens.cu_seqlens.diff()[:, None] == 0, 0)

    def _means_folded(self, tokens: _Tokens, folded: _FoldedBlock) -> tuple[Tensor, Tensor]:
        if isinstance(folded.hidden_weight, list):
            return self._means_quantized(tokens, folded, folded.hidden_weight)
        return ops.latent_pool(
            tokens.rows,
            tokens.cu_seqlens,
            folded.score_weight,
            folded.score_bias,
            folded.value_weight,
            folded.hidden_weight,
            folded.hidden_bias,
            heads=self.heads,
            eps=self.eps,
        )

    def _past_the_mean(self, y: Tensor, gated: Tensor | None) -> Tensor:
        """The means with the feed-forward's last matrix applied, in the dtype of the means."""
        last = self._layer(0).ffn_out
        if gated is None or not isinstance(last, nn.Linear):
            return y if gated is None else y + gated
        weight, bias = last.weight, last.bias
        if weight.dtype != gated.dtype:
            # A piece at a time: the whole matrix in float32 would be the largest thing in memory.
            pieces = [_matrix_vector(part.to(gated.dtype), gated) for part in weight.split(_HIDDEN_CHUNK // 4)]
            product = torch.cat(pieces, dim=1)
        else:
            product = _matrix_vector(weight, gated)
        return y + product if bias is None else y + product + bias

    def _means_by_tiles(self, tokens: _Tokens) -> tuple[Tensor, Tensor | None]:
        """Means over each sequence as the parameters say, without folding; recomputed by tiles in the backward."""
        layer = self._layer(0)
        dtype = torch.promote_types(self.latents.dtype, torch.float32)
        keys, values = self._kept_keys_values(layer)
        lengths = tokens.cu_seqlens.diff()
        sequence = torch.repeat_interleave(lengths, output_size=len(tokens.rows))

        def sums(rows: Tensor, of: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
            y = layer.attention(rows, keys, values)
            parts = (y,) if layer.ffn is None else (y, layer.gated(y))
            zeros = [part.new_zeros(len(lengths), part.shape[1], dtype=dtype) for part in parts]
            return tuple(zero.index_add(0, of, part.to(dtype)) for zero, part in zip(zeros, parts, strict=True))

        totals: tuple[Tensor, ...] = ()
        rows = tokens.rows.to(self.latents.dtype)
        for first in range(0, max(1, len(rows)), _TRAINING_TILE):
            arguments = (rows[first : first + _TRAINING_TILE], sequence[first : first + _TRAINING_TILE], keys, values)
            part = checkpoint(sums, *arguments, use_reentrant=False) if torch.is_grad_enabled() else sums(*arguments)
            totals = part if not totals else tuple(a + b for a, b in zip(totals, part, strict=True))
        means = [total / lengths.clamp(min=1)[:, None] for total in totals]
        return means[0], means[1] if len(means) > 1 else None

    def _means_quantized(
        self, tokens: _Tokens, folded: _FoldedBlock, chunks: list[QuantLinear]
    ) -> tuple[Tensor, Tensor]:
        """As `latent_pool`, with the first matrix of the feed-forward in QuantLinear layers of values and gates."""
        rows = tokens.rows
        if rows.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            rows = rows.float()
        tiles = ops.Tiles(
            rows,
            tokens.cu_seqlens,
            folded.score_weight,
            folded.score_bias,
            folded.value_weight,
            self.heads,
            self.eps,
        )
        hidden = sum(chunk.out_features for chunk in chunks) // 2
        sums = rows.new_zeros(len(tokens.cu_seqlens) - 1, hidden, dtype=torch.float64)
        for first, normalized in tiles:
            column = 0
            for chunk in chunks:
                values, gates = chunk(normalized).chunk(2, dim=1)
                columns = values.shape[1]
                ops.gate(values, gates, first, tiles.offsets, sums[:, column : column + columns])
                column += columns
        sums += tiles.y_sums.sum(dim=1, keepdim=True) * 0  # a sequence that is NaN in y is so here
        return tiles.means(tiles.y_sums), tiles.means(sums)

    def _every_token(self, hidden_states: Tensor, keep: Tensor) -> Tensor:
        layer = self._layer(0)
        rows = torch.where(keep[..., None], hidden_states, 0).to(self.latents.dtype)
        z = layer.feed_forward(layer.attention(rows, *self._kept_keys_values(layer)))
        return F.normalize(z, dim=-1) if self.normalize else z

    def _pool_by_latents(self, hidden_states: Tensor, keep: Tensor | None) -> Tensor:
        folded = self._fold_if_it_pays(hidden_states)
        if folded is None or not len(hidden_states):
            latents = self._attend_by_latents(hidden_states, keep)
        elif hidden_states.device.type != "cpu" or has_kernels(hidden_states.to(self.latents.dtype)):
            latents = self._layer(0).feed_forward(self._attend_folded_at_once(hidden_states, keep, folded))
        else:
            rows = _kept_tokens(hidden_states, keep)
            latents = torch.stack([self._attend_folded(_aligned(row.to(self.latents.dtype)), folded) for row in rows])
            latents = _by_fixed_blocks(self._layer(0).feed_forward, latents)
        latents = self.norm_final(latents)
        reduced = {
            "first": lambda: latents[:, 0],
            "mean_latents": lambda: latents.mean(dim=1),
            "flatten": lambda: latents.flatten(1),
            "all": lambda: latents,
        }[self.reduce]()
        if keep is None:
            return reduced if hidden_states.shape[1] else torch.zeros_like(reduced)
        empty = ~keep.any(dim=1)
        return reduced.masked_fill(empty.reshape(-1, *[1] * (reduced.dim() - 1)), 0)

    def _attend_by_latents(self, hidden_states: Tensor, keep: Tensor | None) -> Tensor:
        if keep is None:
            keep = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool)
        x = torch.where(keep[..., None], hidden_states, 0).to(self.latents.dtype)
        latents = self.latents.expand(len(x), -1, -1)
        # A row without tokens attends to its padding, zeros, and is overwritten.
        keep = keep | ~keep.any(dim=1, keepdim=True)
        for layer in self.layers:
            assert isinstance(layer, _Layer)
            keys, values = layer.keys_values(x)
            kept = keep
            if self.concat_latents:
                own = layer.norm_q(latents)
                own_keys = layer.k_norm(layer.split(layer.to_k(own)))
                keys, values = (
                    torch.cat([keys, own_keys], dim=2),
                    torch.cat([values, layer.split(layer.to_v(own))], dim=2),
                )
                kept = F.pad(keep, (0, latents.shape[1]), value=True)
            latents = layer.feed_forward(layer.attention(latents, keys, values, kept))
        return latents

    def _attend_folded(self, rows: Tensor, folded: _FoldedQueries) -> Tensor:
        """The latents [L, D] after attending to one sequence [N, D], by itself: no row depends on its batch."""
        if not len(rows):
            return rows.new_zeros(self.latents.shape)
        rows = self._keys_folded(rows)
        weights = (folded.score_weight @ rows.T).softmax(dim=-1)
        return self._after_folded(weights @ rows, folded)

    def _attend_folded_at_once(self, hidden_states: Tensor, keep: Tensor | None, folded: _FoldedQueries) -> Tensor:
        """The latents [B, L, D] after attending to their sequences [B, T, D]: keys and values are the tokens."""
        rows = self._keys_folded(hidden_states.to(self.latents.dtype))[:, None]
        queries = folded.score_weight.expand(len(rows), 1, -1, -1)
        return self._after_folded(latent_attention(queries, rows, rows, keep, scale=1.0)[:, 0], folded)

    def _keys_folded(self, rows: Tensor) -> Tensor:
        normed = isinstance(self._layer(0).norm_kv, nn.LayerNorm)
        return F.layer_norm(rows, (self.dim,), eps=self.eps) if normed else rows

    def _after_folded(self, pooled: Tensor, folded: _FoldedQueries) -> Tensor:
        """The latents [.., L, D] from the averages of the tokens [.., H * L, D]."""
        values = pooled.unflatten(-2, (self.heads, -1)) @ folded.value_weight.transpose(1, 2)
        attended = values.transpose(-3, -2).flatten(-2) + folded.value_bias
        return self._layer(0).after_attention(attended, self.latents, folded.projected)

    # ---- folding -----------------------------------------------------------------------------------------------------

    def folds(self) -> bool:
        """Whether inference folds: whether it can for these settings, and is less arithmetic for these sizes."""
        latents, layer = len(self.latents), self._layer(0)
        if self.qk_norm or len(self.layers) > 1:
            return False
        if self.direction == "latents_q":
            return not self.concat_latents and latents < self.head_dim
        return (
            self.reduce == "masked_mean"
            and layer.ffn == "geglu"
            and layer.residual == "q_in"
            and isinstance(layer.to_out, nn.Linear)
            and layer.to_out.bias is None
            and isinstance(layer.norm_q, nn.LayerNorm)
            and isinstance(layer.norm_ffn, nn.LayerNorm)
            and self.head_dim * (self.dim + latents) > self.dim * latents
        )

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
            with torch.no_grad():
                self._folded = self._fold_queries() if self.direction == "latents_q" else self._fold_block()
            self._folded_from = self._state()
        return self

    def arithmetic(self, tokens: int, sequences: int = 1) -> dict[str, float]:
        """Floating-point operations (a multiplication and an addition are two) for so many kept tokens in all.

        Returns: "released", as the model's own code computes, with keys and values of the latents for every sequence;
        "cached", with these computed once; "folded", as inference here computes: after every exact fold, or, where the
        module does not fold, after moving the last matrix past the mean. Matrix products only.
        """
        check_integer("tokens", tokens, 0)
        check_integer("sequences", sequences, 1)
        layer = self._layer(0)
        dim, inner, latents, heads = self.dim, self.heads * self.head_dim, len(self.latents), self.heads
        first = layer.ffn_in.weight.numel() if isinstance(layer.ffn_in, nn.Linear) else 0
        last = layer.ffn_out.weight.numel() if isinstance(layer.ffn_out, nn.Linear) else 0
        if self.direction == "tokens_q":
            keys_values = 2 * latents * dim * inner
            per_token = 2 * dim * inner + 2 * latents * inner + first + last
            released = tokens * per_token + sequences * keys_values
            cached = tokens * per_token
            left = cached - (tokens - sequences) * last
            folded = tokens * (2 * dim * heads * latents + first) + sequences * last
        else:
            depth = len(self.layers)
            per_sequence = latents * (first + last + dim * inner)
            queries = latents * dim * inner
            released = depth * (tokens * (2 * dim * inner + 2 * latents * inner) + sequences * (per_sequence + queries))
            cached = left = released - sequences * queries
            folded = tokens * 2 * dim * heads * latents + sequences * (per_sequence + latents * dim * inner)
        return {
            "released": 2.0 * released,
            "cached": 2.0 * cached,
            "folded": 2.0 * (folded if self.folds() else left),
        }

    def _fold_if_it_pays(self, hidden_states: Tensor) -> Any:
        """The folded weights, or None where this forward pass has to use the parameters."""
        needs_grad = torch.is_grad_enabled() and (
            hidden_states.requires_grad or any(parameter.requires_grad for parameter in self.parameters())
        )
        if self.training or needs_grad or not self.folds():
            return None
        if torch.compiler.is_compiling():
            return self._folded
        if self._folded is None or self._folded_from != self._state():
            self.fold()
        return self._folded

    def _state(self) -> tuple[Any, ...]:
        """What tells that a parameter was replaced or changed in place."""
        return tuple(
            (id(parameter), parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version)
            for parameter in self.parameters()
        )

    def _unfold(self) -> None:
        self._folded, self._folded_from = None, ()

    def _layer(self, index: int) -> _Layer:
        layer = self.layers[index]
        assert isinstance(layer, _Layer)
        return layer

    def _kept_keys_values(self, layer: _Layer) -> tuple[Tensor, Tensor]:
        """Keys and values of the latents [H, L, d_h]; between forward passes in evaluation mode they are kept."""
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())
        if self.training or trains or torch.compiler.is_compiling() or self.folds():
            return layer.keys_values(self.latents)
        if self._folded is None or self._folded_from != self._state():
            self._folded, self._folded_from = layer.keys_values(self.latents), self._state()
        return self._folded

    def _fold_block(self) -> _FoldedBlock:
        layer, low = self._layer(0), self.latents.dtype
        low = low if low in (torch.bfloat16, torch.float64) else torch.float32
        accumulate = torch.promote_types(low, torch.float32)
        heads, latents = self.heads, len(self.latents)
        assert isinstance(layer.to_out, nn.Linear)
        assert isinstance(layer.ffn_in, nn.Linear)
        context = _normed(self.latents.double(), layer.norm_kv)
        scores = self.latents.new_empty(heads * latents, self.dim, dtype=low)
        score_bias = self.latents.new_empty(heads * latents, dtype=accumulate)
        # As GPU kernels read it, latent by latent; those of the CPU read panels.
        values = self.latents.new_empty(heads * latents, self.dim, dtype=low).T
        # In double precision, and a head at a time, so that what is in memory besides stays small.
        for head in range(heads):
            rows = slice(head * self.head_dim, (head + 1) * self.head_dim)
            columns = slice(head * latents, (head + 1) * latents)
            keys = _linear(context, layer.to_k, rows)
            weight = reference.fold_scores(layer.to_q.weight[rows].double(), keys, layer.scale)
            bias = None if layer.to_q.bias is None else keys @ layer.to_q.bias[rows].double() * layer.scale
            weight, bias = reference.fold_norm(weight, bias, *_affine(layer.norm_q))
            scores[columns], score_bias[columns] = weight.to(low), bias.to(accumulate)
            del keys, weight
            head_values = _linear(context, layer.to_v, rows)
            values[:, columns] = (layer.to_out.weight[:, rows].double() @ head_values.T).to(low)
        packs = self.latents.device.type == "cpu" and low != torch.float64
        hidden, hidden_bias = self._fold_hidden(layer.ffn_in, low, accumulate, packs)
        if packs:
            scores, values = ops.pack_weight(scores), ops.pack_weight(values)
        return _FoldedBlock(scores, score_bias, values, hidden, hidden_bias)

    def _fold_hidden(
        self, linear: nn.Linear, low: torch.dtype, accumulate: torch.dtype, packs: bool
    ) -> tuple[Tensor | list[QuantLinear], Tensor]:
        """The feed-forward's first matrix with its LayerNorm, by chunks of values and their gates."""
        gain, shift = _affine(self._layer(0).norm_ffn)
        half = linear.out_features // 2
        biases = linear.weight.new_empty(2, half, dtype=accumulate)
        plain: list[tuple[Tensor, Tensor]] = []
        packed: list[Tensor] = []
        quantized: list[QuantLinear] = []
        for first in range(0, half, _HIDDEN_CHUNK):
            columns = slice(first, min(half, first + _HIDDEN_CHUNK))
            parts = []
            for side, rows in enumerate((columns, slice(half + columns.start, half + columns.stop))):
                bias = None if linear.bias is None else linear.bias[rows].double()
                weight, bias = reference.fold_norm(linear.weight[rows].double(), bias, gain, shift)
                biases[side, columns] = bias.to(accumulate)
                parts.append(weight.to(low))
            if self.ffn_bits is not None and packs:
                quantized.append(_quantized(torch.cat(parts), biases[:, columns].flatten(), self.ffn_bits))
            elif packs:
                packed.append(ops.pack_weight(torch.cat(parts), gated=True))
            else:
                plain.append((parts[0], parts[1]))
        if quantized:
            return quantized, biases.flatten()
        if packed:
            return _joined(packed), biases.flatten()
        return torch.cat([part for side in zip(*plain, strict=True) for part in side]), biases.flatten()

    def _fold_queries(self) -> _FoldedQueries:
        layer, low = self._layer(0), self.latents.dtype
        queries = layer.split(_linear(_normed(self.latents.double(), layer.norm_q), layer.to_q))
        key_weight = layer.to_k.weight.double().unflatten(0, (self.heads, -1))
        # A constant per query cancels in the softmax: neither the keys' bias nor the LayerNorm's shift matters there.
        scores = (queries @ key_weight).flatten(0, 1) * layer.scale
        value_weight, value_bias = layer.to_v.weight.double(), layer.to_v.bias
        constant = value_weight.new_zeros(len(value_weight)) if value_bias is None else value_bias.double()
        if isinstance(layer.norm_kv, nn.LayerNorm):
            gain, shift = _affine(layer.norm_kv)
            scores = scores * gain
            constant = constant + value_weight @ shift
            value_weight = value_weight * gain
        return _FoldedQueries(
            scores.to(low),
            value_weight.unflatten(0, (self.heads, -1)).to(low),
            constant.to(low),
            layer.to_q(layer.norm_q(self.latents)),
        )

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


def _kept_tokens(hidden_states: Tensor, keep: Tensor | None) -> list[Tensor]:
    """The tokens of each sequence [B, T, D] that are kept, as views where they stand side by side."""
    if keep is None:
        return list(hidden_states)
    counts = keep.sum(dim=1)
    firsts = keep.int().argmax(dim=1)
    lasts = keep.shape[1] - 1 - keep.flip(1).int().argmax(dim=1)
    spans = torch.stack([firsts, lasts + 1, counts], dim=1).tolist()
    return [
        row[first:end] if end - first == count else row[kept]
        for row, kept, (first, end, count) in zip(hidden_states, keep, spans, strict=True)
    ]


def _aligned(rows: Tensor) -> Tensor:
    """The same in memory that begins at a cache line, on which too the rounding of a matrix product depends."""
    if torch.compiler.is_compiling() or rows.device.type != "cpu" or rows.data_ptr() % 64 == 0:
        return rows
    return rows.clone()


def _by_fixed_blocks(layer: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
    """`layer` of latents [B, L, D], by blocks of as few sequences as have a multiple of 8 rows, filled up at the end.

    How a matrix product rounds a row depends on how many rows it has and on whether the row stands among those that
    fill no block, and a sequence's result must not depend on its batch.
    """
    if torch.is_grad_enabled():
        return layer(latents)
    block = _BLOCK_ROWS // math.gcd(_BLOCK_ROWS, latents.shape[1])
    blocks = [F.pad(part, (0, 0, 0, 0, 0, block - len(part))) for part in latents.split(block)]
    return torch.cat([layer(part) for part in blocks])[: len(latents)]


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(norm, nn.LayerNorm)
    return norm.weight.double(), norm.bias.double()


def _normed(x: Tensor, norm: nn.Module) -> Tensor:
    """`norm` in the dtype of x, where it is one."""
    if not isinstance(norm, nn.LayerNorm):
        return x
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def _linear(x: Tensor, linear: nn.Linear, rows: slice = slice(None)) -> Tensor:
    """Some output features of `linear` in the dtype of x."""
    bias = None if linear.bias is None else linear.bias[rows].to(x.dtype)
    return F.linear(x, linear.weight[rows].to(x.dtype), bias)


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts one after the other; each is given up once it is copied."""
    whole = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    first = 0
    while parts:
        part = parts.pop(0)
        whole[first : first + len(part)] = part
        first += len(part)
    return whole


def _quantized(weight: Tensor, bias: Tensor, bits: int) -> QuantLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight.float(), False), nn.Parameter(bias, False)
    # At 8 bits one scale per row loses nothing that matters, and leaves the inner loop to the products.
    group_size = whole_row(weight.shape[1]) if bits == 8 else 64
    return QuantLinear.from_linear(linear, bits=bits, group_size=group_size, symmetric=bits == 8)


def _matrix_vector(weight: Tensor, rows: Tensor) -> Tensor:
    """rows [B, in] times weight [out, in]: each row by itself, so that it does not depend on the others."""
    if torch.is_grad_enabled() or not len(rows):
        return rows @ weight.T
    return torch.stack([weight @ row for row in rows])


def _most_common_sizes(layout: Mapping[str, tuple[str, ...]], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """How long the axes are, by name, according to most of the tensors; of "2 hidden" also half of it, "hidden"."""
    votes: dict[str, Counter[int]] = {}
    for name, tensor in tensors.items():
        if tensor.dim() == len(layout[name]):
            for axis, size in zip(layout[name], tensor.shape, strict=True):
                factor, _, of = axis.rpartition(" ")
                votes.setdefault(of, Counter())[size // int(factor or 1)] += 1
    sizes = {axis: counts.most_common(1)[0][0] for axis, counts in votes.items()}
    return sizes | {f"2 {axis}": 2 * size for axis, size in sizes.items()}


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
