"""NV-Embed checkpoints of any size, with random weights, and the inputs of their folded block."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import assert_close_to_oracle
from torch import Tensor, nn
from torch.nn import functional as F

from fastembed import use_backend
from fastembed.nn import LatentAttentionPooling
from fastembed.ops import _latent_heads, latent
from fastembed.ops.latent_attention import latent_attention
from fastembed.reference import latent as reference


def nv_embed_weights(
    dim: int = 24,
    latents: int = 10,
    heads: int = 2,
    head_dim: int = 32,
    mult: int = 4,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Random tensors under the released names."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float32) * std + mean).to(dtype)

    inner, hidden = heads * head_dim, mult * dim
    weights = {
        "latents": normal(latents, dim),
        "cross_attend_blocks.0.fn.to_q.weight": normal(inner, dim, std=2 * dim**-0.5),
        "cross_attend_blocks.0.fn.to_kv.weight": normal(2 * inner, dim, std=dim**-0.5),
        "cross_attend_blocks.0.fn.to_out.weight": normal(dim, inner, std=inner**-0.5),
        "cross_attend_blocks.1.fn.net.0.weight": normal(2 * hidden, dim, std=dim**-0.5),
        "cross_attend_blocks.1.fn.net.0.bias": normal(2 * hidden, std=0.1),
        "cross_attend_blocks.1.fn.net.2.weight": normal(dim, hidden, std=hidden**-0.5),
        "cross_attend_blocks.1.fn.net.2.bias": normal(dim, std=0.1),
    }
    for norm in ("0.norm", "0.norm_context", "1.norm"):
        weights[f"cross_attend_blocks.{norm}.weight"] = normal(dim, std=0.1, mean=1)
        weights[f"cross_attend_blocks.{norm}.bias"] = normal(dim, std=0.1)
    return weights


def folded_block(
    lengths: list[int],
    dim: int = 20,
    latents: int = 6,
    heads: int = 2,
    hidden: int = 37,
    dtype: torch.dtype = torch.float32,
    x_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of latent_pool, random."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    x = normal(sum(lengths), dim) * 2
    if dim > 3:
        x[:, 3] += 40  # as hidden states have it: one channel far from the others
    return {
        "x": x.to(x_dtype or dtype),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
        "score_weight": normal(heads * latents, dim, std=dim**-0.5).to(dtype),
        "score_bias": normal(heads * latents),
        "value_weight": normal(dim, heads * latents, std=heads**-0.5).to(dtype),
        "hidden_weight": normal(2 * hidden, dim, std=dim**-0.5).to(dtype),
        "hidden_bias": normal(2 * hidden, std=0.1),
        "heads": heads,
        "eps": 1e-5,
    }


def in_double(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def assert_learned_queries_take_one_launch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folded head with latents as queries, by the backend in use, against itself on the CPU: padding at either side,
    a hole, a row without tokens; and the attention is one call whatever the batch."""
    torch.manual_seed(0)
    settings = {"qkv_bias": True, "ffn": "gelu_tanh", "reduce": "flatten", "normalize": False}
    module = LatentAttentionPooling(24, 3, 2, direction="latents_q", **settings).to(dtype).eval()
    assert module.folds()
    x, mask = torch.randn(5, 11, 24).to(dtype), torch.ones(5, 11, dtype=torch.bool)
    mask[0, :4], mask[1, 7:], mask[2, 5], mask[3] = False, False, False, False
    x[~mask] = float("nan")
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return latent_attention(*args, **kwargs)

    monkeypatch.setattr("fastembed.nn.latent.latents_as_queries.latent_attention", counted)
    with torch.no_grad():
        ours = module(x, mask)
        assert len(calls) == 1
        with use_backend("cpu"):
            theirs = module(x, mask)
            oracle = module.double()(x.double(), mask)
        assert len(calls) == 1
    assert not ours[3].any()
    assert_close_to_oracle(ours, theirs, oracle)


def assert_folded_block_as_good_as_pytorch(
    lengths: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the backend in use, which is a GPU's: the feed-forward by parts, and with weights in panels."""
    monkeypatch.setattr(latent, "_HIDDEN_ELEMENTS", 0)
    monkeypatch.setattr(latent, "_LEAST_HIDDEN", 32)
    inputs = folded_block(lengths, dtype=dtype)
    weights = ("score_weight", "value_weight", "hidden_weight")
    packed = {name: latent.pack_weight(inputs[name], gated=name == "hidden_weight") for name in weights}
    ours = latent.latent_pool(**inputs)
    for one, other in zip(latent.latent_pool(**{**inputs, **packed}), ours, strict=True):
        torch.testing.assert_close(one, other)
    theirs = reference.latent_pool(**inputs)
    oracle = reference.latent_pool(**in_double(inputs))
    for our, their, exact in zip(ours, theirs, oracle, strict=True):
        assert our.dtype == torch.float32
        assert_close_to_oracle(our.to(dtype), their.to(dtype), exact)


def assert_folded_heads_are_added(
    attend_folded: Callable[..., Tensor], heads: int, latents: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads one after the other, and each by itself."""
    generator = torch.Generator().manual_seed(0)
    x, scores, values = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((33, 20), (heads, latents, 20), (heads, latents, 50))
    )
    bias = torch.randn(heads, latents, generator=generator)
    weights = (x.double() @ scores.double().mT + bias[:, None]).softmax(dim=-1)
    oracle = (weights @ values.double()).sum(dim=0)
    for wanted in (1, 1000):
        monkeypatch.setattr(_latent_heads, "PROGRAMS_WANTED", wanted)
        error = (attend_folded(x, scores, bias, values).double() - oracle).abs().max()
        assert error <= (1e-5 if dtype == torch.float32 else 1e-2) * oracle.abs().max()


def assert_only_its_sequence_suffers() -> None:
    """From a token that is infinite, in the folded block by the backend in use."""
    inputs = folded_block([4, 6, 0, 3])
    clean = latent.latent_pool(**inputs)
    inputs["x"][7, 2] = float("inf")
    for result, expected in zip(latent.latent_pool(**inputs), clean, strict=True):
        assert result[1].isnan().all()
        assert torch.equal(result[[0, 2, 3]], expected[[0, 2, 3]])


class LatentAttentionModel(nn.Module):
    """NV-Embed's latent attention, written out after the description of its released code (arXiv 2405.17428)."""

    def __init__(self, weights: dict[str, Tensor], heads: int = 2, output_normalize: bool = True) -> None:
        super().__init__()
        latents, dim = weights["latents"].shape
        inner, hidden = (
            weights[f"cross_attend_blocks.{name}"].shape[0] for name in ("0.fn.to_q.weight", "1.fn.net.0.weight")
        )
        attention, feed_forward = nn.Module(), nn.Module()
        attention.heads = heads
        attention.to_q = nn.Linear(dim, inner, bias=False)
        attention.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        attention.to_out = nn.Linear(inner, dim, bias=False)
        feed_forward.net = nn.Sequential(nn.Linear(dim, hidden), nn.Identity(), nn.Linear(hidden // 2, dim))
        first, second = nn.Module(), nn.Module()
        first.fn, first.norm, first.norm_context = attention, nn.LayerNorm(dim), nn.LayerNorm(dim)
        second.fn, second.norm = feed_forward, nn.LayerNorm(dim)
        self.output_normalize = output_normalize
        self.latents = nn.Parameter(torch.empty(latents, dim))
        self.cross_attend_blocks = nn.ModuleList([first, second])
        self.load_state_dict(weights)

    def forward(self, hiddens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        first, second = self.cross_attend_blocks
        context = first.norm_context(self.latents.expand(len(hiddens), -1, -1))
        query = first.fn.to_q(first.norm(hiddens))
        key, value = first.fn.to_kv(context).chunk(2, dim=-1)
        query, key, value = (part.unflatten(-1, (first.fn.heads, -1)).transpose(1, 2) for part in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        y = first.fn.to_out(attended) + hiddens
        values, gates = second.fn.net[0](second.norm(y)).chunk(2, dim=-1)
        tokens = second.fn.net[2](values * F.gelu(gates)) + y
        if attention_mask is None:
            return tokens
        mask = attention_mask[..., None].to(tokens.dtype)
        pooled = (tokens * mask).sum(1) / mask.sum(1)
        return F.normalize(pooled, dim=-1) if self.output_normalize else pooled
