"""LatentAttentionPooling: NV-Embed as released, its relatives, folding, training, bad input."""

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from latent_models import nv_embed_weights
from tolerance import assert_close_to_oracle
from torch import Tensor, nn
from torch.nn import functional as F

from fastembed.nn import LatentAttentionPooling
from fastembed.ops import latent
from fastembed.reference.latent import nv_embed_pooling

DIM, HEADS = 24, 2


def _batch(dtype: torch.dtype = torch.float64, rows: int = 3, tokens: int = 9) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, tokens, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = torch.ones(rows, tokens, dtype=torch.int64)
    mask[0, :3] = 0
    mask[1, 5:] = 0
    return x, mask


def _nv_embed(dtype: torch.dtype = torch.float64, **sizes: int) -> tuple[LatentAttentionPooling, dict[str, Tensor]]:
    weights = nv_embed_weights(DIM, heads=HEADS, dtype=dtype, **sizes)
    return LatentAttentionPooling.from_nv_embed(weights, heads=HEADS), weights


# ---- NV-Embed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [32, 4])  # folded, and not
@pytest.mark.parametrize("normalize", [True, False])
def test_computes_what_nv_embed_does(head_dim: int, normalize: bool) -> None:
    weights = nv_embed_weights(DIM, heads=HEADS, head_dim=head_dim)
    module = LatentAttentionPooling.from_nv_embed(weights, heads=HEADS, normalize=normalize)
    assert module.folds() == (head_dim == 32)
    x, mask = _batch()
    x[..., 5] += 60
    expected = nv_embed_pooling(x, mask, weights, HEADS, normalize)
    torch.testing.assert_close(module(x, mask), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(module(x, mask), expected, rtol=1e-12, atol=1e-12)
        every = torch.ones_like(mask)
        torch.testing.assert_close(module(x), nv_embed_pooling(x, every, weights, HEADS, normalize))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_good_as_pytorch_in_its_dtype(isa: str, dtype: torch.dtype) -> None:
    module, weights = _nv_embed(dtype)
    x, mask = _batch(dtype)
    x[..., 5] += 20
    exact = {name: weight.double() for name, weight in weights.items()}
    oracle = nv_embed_pooling(x.double(), mask, exact, HEADS)
    with torch.no_grad():
        assert_close_to_oracle(module(x, mask), nv_embed_pooling(x, mask, weights, HEADS), oracle)


def test_float16_is_computed_in_float32() -> None:
    module, weights = _nv_embed(torch.float16)
    x, mask = _batch(torch.float16)
    exact = {name: weight.double() for name, weight in weights.items()}
    with torch.no_grad():
        pooled = module(x, mask)
    assert pooled.dtype == torch.float16
    torch.testing.assert_close(pooled.double(), nv_embed_pooling(x.double(), mask, exact, HEADS), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prefix", ["", "latent_attention_model."])
def test_released_names_with_and_without_prefix(prefix: str) -> None:
    weights = nv_embed_weights(DIM, heads=HEADS)
    checkpoint = {prefix + name: tensor for name, tensor in weights.items()}
    if prefix:
        checkpoint["embedding_model.norm.weight"] = torch.ones(DIM)
    module = LatentAttentionPooling.from_nv_embed(checkpoint, heads=HEADS)
    assert (module.dim, len(module.latents), module.heads, module.head_dim) == (DIM, 10, HEADS, 32)
    assert not module.training
    assert module.latents.data_ptr() == weights["latents"].data_ptr()


def test_a_hidden_width_that_is_no_multiple() -> None:
    weights = nv_embed_weights(dim=11, mult=4)
    for name, kept in (("net.0.weight", 30), ("net.0.bias", 30), ("net.2.weight", (slice(None), slice(15)))):
        key = f"cross_attend_blocks.1.fn.{name}"
        weights[key] = weights[key][kept if isinstance(kept, tuple) else slice(kept)]
    module = LatentAttentionPooling.from_nv_embed(weights, heads=2)
    assert 15 / 11 * 11 < 15  # in floats
    assert module.layers[0].ffn_out.in_features == 15


def test_a_wrong_checkpoint_is_described_whole() -> None:
    weights = nv_embed_weights(DIM, heads=HEADS)
    del weights["cross_attend_blocks.0.norm.bias"]
    weights["cross_attend_blocks.1.fn.net.0.proj.weight"] = torch.zeros(1)
    weights["cross_attend_blocks.0.fn.to_kv.weight"] = torch.zeros(5, DIM)
    with pytest.raises(ValueError, match="not an NV-Embed latent attention") as error:
        LatentAttentionPooling.from_nv_embed(weights, heads=HEADS)
    message = str(error.value)
    assert "cross_attend_blocks.0.norm.bias is missing" in message
    assert "cross_attend_blocks.1.fn.net.0.proj.weight is unknown" in message
    assert "cross_attend_blocks.0.fn.to_kv.weight must have shape [128, 24], got [5, 24]" in message
    with pytest.raises(ValueError, match="3 heads do not divide the 64 rows"):
        LatentAttentionPooling.from_nv_embed(nv_embed_weights(DIM, heads=HEADS), heads=3)
    with pytest.raises(ValueError, match="latents is missing"):
        LatentAttentionPooling.from_nv_embed({})
    weights = nv_embed_weights(DIM, heads=HEADS)
    for name, tensor, problem in (
        ("cross_attend_blocks.0.fn.to_q.weight", None, "cross_attend_blocks.0.fn.to_q.weight is missing"),
        ("latents", weights["latents"][0], f"latents must have shape [latents, {DIM}], got [{DIM}]"),
        ("latents", weights["latents"][:, :7], f"latents must have shape [10, {DIM}], got [10, 7]"),
        ("latents", weights["latents"].half(), "latents must be torch.float64 as the others are, got torch.float16"),
        ("latents", weights["latents"].int(), "latents must be floating point, got torch.int32"),
    ):
        changed = {**weights, name: tensor} if tensor is not None else {k: v for k, v in weights.items() if k != name}
        with pytest.raises(ValueError, match=f"^state_dict is not an NV-Embed latent attention: {re.escape(problem)}$"):
            LatentAttentionPooling.from_nv_embed(changed, heads=HEADS)


@pytest.mark.parametrize(
    ("state_dict", "heads", "error", "message"),
    [
        (None, 8, TypeError, "state_dict must be a dict of tensors by name, got NoneType"),
        ({"latents": [1.0]}, 8, TypeError, "got list as latents"),
        ({}, 0, ValueError, "heads must be at least 1, got 0"),
        ({}, "8", TypeError, "heads must be an integer, got '8'"),
    ],
)
def test_what_is_no_checkpoint(state_dict: Any, heads: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LatentAttentionPooling.from_nv_embed(state_dict, heads)


def test_unpooled_tokens() -> None:
    weights = nv_embed_weights(DIM, heads=HEADS)
    pooling = LatentAttentionPooling.from_nv_embed(weights, heads=HEADS)
    every = LatentAttentionPooling(DIM, 10, HEADS, 32, reduce="all", normalize=False).double()
    every.load_state_dict(pooling.state_dict())
    x, _ = _batch()
    torch.testing.assert_close(every(x), nv_embed_pooling(x, None, weights, HEADS))


def test_a_row_does_not_depend_on_its_batch(isa: str) -> None:
    for bits in (None, 8, 4):
        module, _ = _nv_embed(torch.float32)
        module.quantize(bits)
        x, mask = _batch(torch.float32)
        with torch.no_grad():
            together = module(x, mask)
            for row in range(3):
                assert torch.equal(module(x[row : row + 1], mask[row : row + 1])[0], together[row])


def test_learned_queries_do_not_depend_on_their_batch() -> None:
    for latents in (1, 3):
        torch.manual_seed(0)
        module = _relative(latents, qkv_bias=True, ffn="gelu_tanh", reduce="flatten").float()
        assert module.folds()
        x, _ = _batch(torch.float32, rows=11)
        mask = torch.rand(11, 9) < 0.7
        mask[0], mask[1, :4], mask[2, 5:] = True, False, False
        with torch.no_grad():
            together = module(x, mask)
            for row in range(11):
                kept = x[row : row + 1, mask[row]]
                assert torch.equal(module(kept)[0], together[row])
                assert torch.equal(module(x[row : row + 1], mask[row : row + 1])[0], together[row])


def test_arithmetic_of_nv_embed() -> None:
    with torch.device("meta"):
        module = LatentAttentionPooling(4096, 512, 8, 4096)
    operations = module.arithmetic(512)
    assert module.folds()
    assert round(operations["released"] / 1e9) == 790
    assert round(operations["folded"] / 1e9) == 172
    assert operations["cached"] / operations["folded"] == pytest.approx(3.0, abs=0.01)


# ---- folding ---------------------------------------------------------------------------------------------------------


def test_whatever_changes_the_parameters_undoes_the_fold() -> None:
    module, _weights = _nv_embed()
    x, mask = _batch()

    def check() -> None:
        with torch.no_grad():
            ours = module(x, mask)
        torch.testing.assert_close(ours, module(x, mask).detach(), rtol=1e-12, atol=1e-12)

    check()
    with torch.no_grad():
        module.latents.mul_(1.5)
    check()
    module.load_state_dict({name: tensor * 1.1 for name, tensor in module.state_dict().items()})
    check()
    module.layers[0].to_q.weight = nn.Parameter(module.layers[0].to_q.weight * 2)
    check()
    module.train()
    assert module._folded is None
    module.eval()
    check()
    module.float()
    assert module._folded is None
    with torch.no_grad():
        assert module(x.float(), mask).dtype == torch.float32


def test_the_fold_is_no_part_of_what_is_saved() -> None:
    module, _ = _nv_embed()
    names = set(module.state_dict())
    x, mask = _batch()
    with torch.no_grad():
        expected = module(x, mask)
        assert set(module.state_dict()) == names
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert twin._folded is None
            assert torch.equal(twin(x, mask), expected)
    with torch.inference_mode():
        assert torch.equal(module(x, mask), expected)


def test_eight_bits() -> None:
    module, weights = _nv_embed(torch.float32)
    x, mask = _batch(torch.float32)
    x[2, 1] = float("inf")
    module.quantize(8)
    with torch.no_grad():
        pooled = module(x, mask)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(module(x, mask)[:2], pooled[:2])
    expected = nv_embed_pooling(x, mask, weights, HEADS)
    assert F.cosine_similarity(pooled, expected)[:2].min() > 0.9999
    assert pooled[2].isnan().all()
    with torch.no_grad():
        torch.testing.assert_close(module.quantize(None)(x, mask)[:2], expected[:2])
    with pytest.raises(ValueError, match="bits must be between 1 and 8, got 9"):
        module.quantize(9)
    with pytest.raises(ValueError, match="only a block that folds"):
        LatentAttentionPooling(DIM, 40, HEADS, 4).quantize(8)
    elsewhere = torch.empty(3, DIM, device="meta")
    with pytest.raises(ValueError, match="hidden_states must be on the cpu"):
        latent.Tiles(elsewhere, elsewhere, elsewhere, elsewhere, elsewhere, HEADS, 1e-5)


# ---- masks and values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["tokens_q", "latents_q"])
@pytest.mark.parametrize("grad", [True, False])
def test_empty_rows_and_values_that_are_not_finite(direction: str, grad: bool) -> None:
    torch.manual_seed(0)
    reduce = "masked_mean" if direction == "tokens_q" else "first"
    module = LatentAttentionPooling(DIM, 4, HEADS, direction=direction, reduce=reduce).double().eval()
    x, mask = _batch(rows=4)
    with torch.set_grad_enabled(grad):
        clean = module(x, mask)
        mask[2] = 0
        x[0, 0] = float("nan")  # masked
        x[2] = float("inf")  # masked
        x[3, 4, 5] = float("nan")
        pooled = module(x, mask)
    torch.testing.assert_close(pooled[:2], clean[:2])
    assert (pooled[2] == 0).all()
    assert pooled[3].isnan().all()
    with torch.no_grad():
        assert module(x[:0], mask[:0]).shape == (0, DIM)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_any_dtype(mask_dtype: torch.dtype) -> None:
    module, _ = _nv_embed()
    x, mask = _batch()
    expected = module(x, mask)
    assert torch.equal(module(x, mask.to(mask_dtype)), expected)
    additive = torch.zeros(3, 1, 1, 9).masked_fill_(mask[:, None, None] == 0, torch.finfo(torch.float16).min)
    assert torch.equal(module(x, additive), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latents": 0}, "latents must be at least 1, got 0"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"heads": 5}, "heads must divide dim 24 where head_dim is not given, got 5"),
        ({"direction": "both"}, "direction must be one of 'tokens_q', 'latents_q', got 'both'"),
        ({"ffn": "swish"}, "ffn must be one of 'geglu', 'gelu', 'gelu_tanh', 'relu1', None, got 'swish'"),
        ({"reduce": "first"}, "reduce of tokens_q must be one of 'masked_mean', 'all', got 'first'"),
        ({"depth": 2}, "depth > 1, concat_latents and ln_after need direction='latents_q'"),
        ({"head_dim": 5, "residual": "q_proj"}, r"heads \* head_dim must be dim 24"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentAttentionPooling(DIM, **{"heads": HEADS, **settings})


def test_bad_input() -> None:
    module, _ = _nv_embed()
    x, mask = _batch()
    with pytest.raises(ValueError, match=r"hidden_states must have shape \[batch, tokens, 24\], got \[3, 9, 23\]"):
        module(x[..., 1:])
    with pytest.raises(TypeError, match=r"hidden_states must be floating point, got torch\.int64"):
        module(x.long())
    with pytest.raises(TypeError, match=r"attention_mask must be a tensor, got list"):
        module(x, mask.tolist())
    with pytest.raises(TypeError, match=r"bits must be an integer, got 7\.5"):
        module.quantize(7.5)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[3, 9\], as hidden_states, got \[3, 8\]"):
        module(x, mask[:, 1:])


# ---- training --------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_released_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastembed.nn.latent.tokens_as_queries.TRAINING_TILE", 4)
    module, weights = _nv_embed()
    module.train()
    x, mask = _batch()
    x.requires_grad_(True)
    upstream = torch.randn(3, DIM, dtype=torch.float64)
    (module(x, mask) * upstream).sum().backward()
    grad, x.grad = x.grad, None
    leaves = {name: weight.clone().requires_grad_(True) for name, weight in weights.items()}
    (nv_embed_pooling(x, mask, leaves, HEADS) * upstream).sum().backward()
    torch.testing.assert_close(grad, x.grad)
    layer = module.layers[0]
    torch.testing.assert_close(module.latents.grad, leaves["latents"].grad)
    torch.testing.assert_close(
        torch.cat([layer.to_k.weight.grad, layer.to_v.weight.grad]),
        leaves["cross_attend_blocks.0.fn.to_kv.weight"].grad,
    )
    for ours, theirs in (
        (layer.norm_q.weight, "0.norm.weight"),
        (layer.norm_kv.bias, "0.norm_context.bias"),
        (layer.to_q.weight, "0.fn.to_q.weight"),
        (layer.to_out.weight, "0.fn.to_out.weight"),
        (layer.norm_ffn.weight, "1.norm.weight"),
        (layer.ffn_in.weight, "1.fn.net.0.weight"),
        (layer.ffn_in.bias, "1.fn.net.0.bias"),
        (layer.ffn_out.weight, "1.fn.net.2.weight"),
        (layer.ffn_out.bias, "1.fn.net.2.bias"),
    ):
        torch.testing.assert_close(ours.grad, leaves[f"cross_attend_blocks.{theirs}"].grad)


@pytest.mark.parametrize("direction", ["tokens_q", "latents_q"])
def test_gradcheck(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastembed.nn.latent.tokens_as_queries.TRAINING_TILE", 3)
    torch.manual_seed(0)
    reduce = "masked_mean" if direction == "tokens_q" else "mean_latents"
    module = LatentAttentionPooling(6, 3, 2, 4, direction=direction, reduce=reduce, mult=2).double()
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1]])
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    parameters = dict(module.named_parameters())

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x, mask))

    assert torch.autograd.gradcheck(call, (x, *parameters.values()), fast_mode=True)


# ---- the relatives ---------------------------------------------------------------------------------------------------


def _relative(latents: int, **settings: Any) -> LatentAttentionPooling:
    torch.manual_seed(0)
    module = LatentAttentionPooling(DIM, latents, HEADS, direction="latents_q", normalize=False, **settings)
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.3)
    return module.double().eval()


def _assert_same_folded_and_not(module: LatentAttentionPooling, x: Tensor, mask: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(module(x, mask), expected, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(module(x, mask), expected, rtol=1e-11, atol=1e-11)


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(-3, -2)


@pytest.mark.parametrize("with_norms", [True, False])
def test_set_transformer_pma(with_norms: bool) -> None:
    """Lee et al., arXiv 1810.00825: the residual is the projected query, the scale that of the whole width."""
    module = _relative(
        3,
        scale="model",
        qkv_bias=True,
        out_proj=False,
        norm_q=False,
        norm_kv=False,
        residual="q_proj",
        ffn="relu1",
        norm_ffn=False,
        ln_after=with_norms,
        reduce="all",
    )
    assert module.folds()
    x, mask = _batch()
    layer = module.layers[0]
    query, key, value = _linear(layer.to_q, module.latents), _linear(layer.to_k, x), _linear(layer.to_v, x)
    weights = _heads(query) @ _heads(key).transpose(-1, -2) / DIM**0.5
    weights = weights.masked_fill(mask[:, None, None] == 0, -torch.inf).softmax(-1)
    out = query + (weights @ _heads(value)).transpose(1, 2).flatten(2)
    norm = layer.norm_attention if with_norms else nn.Identity()
    out = norm(out)
    out = out + F.relu(_linear(layer.ffn_in, out))
    norm = layer.norm_output if with_norms else nn.Identity()
    _assert_same_folded_and_not(module, x, mask, norm(out))


def test_siglip_head() -> None:
    """Against transformers' own class. SigLIP has no mask; SigLIP 2 has one."""
    siglip = pytest.importorskip("transformers.models.siglip.modeling_siglip")
    siglip2 = pytest.importorskip("transformers.models.siglip2.modeling_siglip2")
    module = _relative(
        1,
        qkv_bias=True,
        out_bias=True,
        norm_q=False,
        norm_kv=False,
        residual="none",
        ffn="gelu_tanh",
        reduce="first",
        eps=1e-6,
    )
    layer = module.layers[0]
    sizes = {"hidden_size": DIM, "intermediate_size": 4 * DIM, "num_attention_heads": HEADS}
    theirs = siglip.SiglipMultiheadAttentionPoolingHead(siglip.SiglipVisionConfig(**sizes)).double().eval()
    config2 = siglip2.Siglip2VisionConfig(**sizes)
    config2._attn_implementation = "eager"
    theirs2 = siglip2.Siglip2MultiheadAttentionPoolingHead(config2).double().eval()
    state = {
        "probe": module.latents[None],
        "attention.in_proj_weight": torch.cat([layer.to_q.weight, layer.to_k.weight, layer.to_v.weight]),
        "attention.in_proj_bias": torch.cat([layer.to_q.bias, layer.to_k.bias, layer.to_v.bias]),
        "attention.out_proj.weight": layer.to_out.weight,
        "attention.out_proj.bias": layer.to_out.bias,
        "layernorm.weight": layer.norm_ffn.weight,
        "layernorm.bias": layer.norm_ffn.bias,
        "mlp.fc1.weight": layer.ffn_in.weight,
        "mlp.fc1.bias": layer.ffn_in.bias,
        "mlp.fc2.weight": layer.ffn_out.weight,
        "mlp.fc2.bias": layer.ffn_out.bias,
    }
    assert module.folds()
    x, mask = _batch()
    for head, arguments in ((theirs, (x,)), (theirs2, (x, mask))):
        head.load_state_dict({name: tensor.detach() for name, tensor in state.items()})
        ours = torch.ones_like(mask) if head is theirs else mask
        _assert_same_folded_and_not(module, x, ours, head(*arguments).detach())


def test_perceiver_resampler() -> None:
    """Flamingo, arXiv 2204.14198: latents attend to the tokens and themselves, layer by layer."""
    module = _relative(
        5, concat_latents=True, ffn="gelu", ffn_bias=False, depth=2, norm_final=True, reduce="all", mult=4
    )
    assert not module.folds()
    x, mask = _batch()
    latents = module.latents.expand(3, -1, -1)
    for layer in module.layers:
        own = layer.norm_q(latents)
        context = torch.cat([layer.norm_kv(x), own], dim=1)
        query, key, value = _heads(layer.to_q(own)), _heads(layer.to_k(context)), _heads(layer.to_v(context))
        weights = query @ key.transpose(-1, -2) * (DIM // HEADS) ** -0.5
        kept = F.pad(mask, (0, 5), value=1)
        weights = weights.masked_fill(kept[:, None, None] == 0, -torch.inf).softmax(-1)
        latents = latents + layer.to_out((weights @ value).transpose(1, 2).flatten(2))
        latents = latents + layer.ffn_out(F.gelu(layer.ffn_in(layer.norm_ffn(latents))))
    _assert_same_folded_and_not(module, x, mask, module.norm_final(latents))


@pytest.mark.parametrize(("reduce", "qk_norm"), [("first", False), ("mean_latents", False), ("first", True)])
def test_timm_attention_pool_latent(reduce: str, qk_norm: bool) -> None:
    """timm's AttentionPoolLatent, pool_type "token" and "avg"."""
    module = _relative(
        2,
        qkv_bias=True,
        out_bias=True,
        norm_q=False,
        norm_kv=False,
        qk_norm=qk_norm,
        residual="none",
        ffn="gelu",
        reduce=reduce,
    )
    assert module.folds() != qk_norm
    x, mask = _batch()
    layer = module.layers[0]
    query = layer.q_norm(_heads(layer.to_q(module.latents.expand(3, -1, -1))))
    key, value = layer.k_norm(_heads(layer.to_k(x))), _heads(layer.to_v(x))
    pooled = F.scaled_dot_product_attention(query, key, value, attn_mask=(mask != 0)[:, None, None])
    out = layer.to_out(pooled.transpose(1, 2).flatten(2))
    out = out + layer.ffn_out(F.gelu(layer.ffn_in(layer.norm_ffn(out))))
    _assert_same_folded_and_not(module, x, mask, out[:, 0] if reduce == "first" else out.mean(1))


def test_folded_latent_queries_after_norms() -> None:
    module = _relative(3, qkv_bias=True, reduce="flatten")
    assert module.folds()
    x, mask = _batch()
    _assert_same_folded_and_not(module, x, mask, module(x, mask).detach())


def test_a_gradient_through_a_frozen_head() -> None:
    module, weights = _nv_embed()
    module.requires_grad_(False)
    x, mask = _batch()
    x.requires_grad_(True)
    module(x, mask)[:, 0].sum().backward()
    grad, x.grad = x.grad, None
    nv_embed_pooling(x, mask, weights, HEADS)[:, 0].sum().backward()
    torch.testing.assert_close(grad, x.grad)


def test_compiles_whole_once_folded() -> None:
    module, _ = _nv_embed(torch.float32)
    x, mask = _batch(torch.float32)
    with torch.no_grad():
        expected = module.fold()(x, torch.ones_like(mask))
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
