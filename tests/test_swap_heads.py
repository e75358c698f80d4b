"""swap of attention pooling heads: SigLIP's and NV-Embed's latent attention."""

import copy
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from latent_models import LatentAttentionModel, nv_embed_weights
from torch import nn

import fastembed
from fastembed import QuantConfig
from fastembed.nn import LatentAttentionPooling, QuantLinear


def siglip(**settings: object) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(**tiny_models.IMAGE, **settings)
    model = transformers.SiglipVisionModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases of zero hide a lost bias
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def nv_embed() -> nn.Module:
    return nn.ModuleDict({"head": LatentAttentionModel(nv_embed_weights(dtype=torch.float32))}).eval()


def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("hidden_act", ["gelu_pytorch_tanh", "gelu"])
def test_siglip_head(hidden_act: str) -> None:
    model = siglip(hidden_act=hidden_act)
    expected = model(images()).pooler_output
    report = fastembed.swap(model, quantize=None, verbose=False)
    assert [row.kind for row in report.rows] == ["attention pooling"]
    assert report.rows[0].bytes_before == report.rows[0].bytes_after
    torch.testing.assert_close(model(images()).pooler_output, expected)
    fastembed.unswap(model)
    assert torch.equal(model(images()).pooler_output, expected)


@torch.no_grad()
def test_the_linear_layers_of_a_replaced_head_stay_whole() -> None:
    model = siglip()
    head = next(module for module in model.modules() if "PoolingHead" in type(module).__name__)
    expected = model(images()).pooler_output
    fastembed.swap(model, QuantConfig(bits=8), verbose=False)
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    assert not any(isinstance(module, QuantLinear) for module in head.modules())
    assert torch.cosine_similarity(model(images()).pooler_output, expected).min() > 0.99
    fastembed.unswap(model)
    assert torch.equal(model(images()).pooler_output, expected)


def test_a_head_with_another_activation_stays() -> None:
    with pytest.raises(ValueError, match="nothing to swap"):
        fastembed.swap(siglip(hidden_act="relu"), quantize=None, verbose=False)


def test_a_swapped_head_trains_the_tensors_of_the_original() -> None:
    model = siglip()
    other = copy.deepcopy(model)
    fastembed.swap(model, quantize=None, verbose=False)
    for each in (model, other):
        each(images()).pooler_output.square().sum().backward()
        torch.optim.SGD(each.parameters(), lr=1e-3).step()
    fastembed.unswap(model)
    state = other.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], msg=name)


@torch.no_grad()
def test_latent_attention_of_nv_embed() -> None:
    model = nv_embed()
    tokens, mask = torch.randn(3, 9, 24), torch.ones(3, 9, dtype=torch.int64)
    mask[1, 4:], mask[2, :3] = 0, 0
    expected, every_token = model["head"](tokens, mask), model["head"](tokens)
    report = fastembed.swap(model, QuantConfig(bits=8), verbose=False)
    assert [(row.name, row.kind) for row in report.rows] == [("head", "latent attention")]
    assert any(isinstance(module, LatentAttentionPooling) for module in model.modules())
    torch.testing.assert_close(model["head"](tokens, mask), expected)
    torch.testing.assert_close(model["head"](tokens), every_token, rtol=1e-4, atol=1e-5)
    fastembed.unswap(model)
    assert torch.equal(model["head"](tokens, mask), expected)


@torch.no_grad()
@pytest.mark.parametrize("keep_originals", [True, False])
def test_a_replaced_head_comes_back(tmp_path: Path, keep_originals: bool) -> None:
    model = siglip()
    fastembed.swap(model, keep_originals=keep_originals, verbose=False)
    fastembed.save_quantized(model, tmp_path)
    loaded = fastembed.load_quantized(tmp_path)
    torch.testing.assert_close(loaded(images()).pooler_output, model(images()).pooler_output)


@torch.no_grad()
def test_a_replaced_head_with_a_quantised_feed_forward_comes_back(tmp_path: Path) -> None:
    def build() -> nn.ModuleDict:
        return nn.ModuleDict({"head": nv_embed()["head"], "linear": nn.Linear(24, 24)})

    model = build()
    fastembed.swap(model, verbose=False)
    model["head"].pooling.quantize(8)
    fastembed.save_quantized(model, tmp_path)
    loaded = fastembed.load_quantized(tmp_path, build())
    tokens, mask = torch.randn(3, 9, 24), torch.ones(3, 9)
    assert loaded["head"].pooling.ffn_bits == 8
    torch.testing.assert_close(loaded["head"](tokens, mask), model["head"](tokens, mask), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="head must be an attention pooling in the model, where the file has one"):
        fastembed.load_quantized(tmp_path, nn.ModuleDict({"head": nn.Linear(24, 24), "linear": nn.Linear(24, 24)}))


def test_a_latent_attention_of_other_tensors_is_named() -> None:
    model = nv_embed()
    model["head"].extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"head cannot be replaced: .*extra is unknown; the model is left as it was"):
        fastembed.swap(model, verbose=False)
    assert isinstance(model["head"], LatentAttentionModel)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
