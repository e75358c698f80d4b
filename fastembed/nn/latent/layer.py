"""One layer of latent attention: its parameters, and what is computed from them."""

import math

from torch import Tensor, nn
from torch.nn import functional as F

from ...ops.latent_attention import latent_attention


def mult_of(hidden: int, dim: int) -> float:
    """The `mult` of a feed-forward of so many hidden features; their plain quotient may come to one too few of them."""
    return math.nextafter(hidden / dim, math.inf)


class Layer(nn.Module):
    """Attention and feed-forward. The arguments are those of LatentAttentionPooling."""

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        *,
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

    def keys_values(self, context: Tensor, normed: bool = False) -> tuple[Tensor, Tensor]:
        """Keys and values [..., H, M, d_h] of a context [..., M, D], which may have had its LayerNorm already."""
        if not normed:
            context = self.norm_kv(context)
        return self.k_norm(self.split(self.to_k(context))), self.split(self.to_v(context))

    def attention(self, rows: Tensor, keys: Tensor, values: Tensor, keep: Tensor | None = None) -> Tensor:
        """Attention of rows [..., S, D] to keys and values [..., H, M, d_h], keep [B, M], with the residual: y."""
        projected = self.to_q(self.norm_q(rows))
        query = self.q_norm(self.split(projected))
        attended = latent_attention(query, keys, values, keep, scale=self.scale)
        return self.after_attention(attended.transpose(-3, -2).flatten(-2), rows, projected)

    def after_attention(self, attended: Tensor, rows: Tensor, projected: Tensor) -> Tensor:
        """y from the values attended to [..., S, H * d_h]: output projection, residual and LayerNorm."""
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
        """z: y with the feed-forward added."""
        return y if self.ffn is None else self.norm_output(y + self.ffn_out(self.gated(y)))
