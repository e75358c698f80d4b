"""dense_exits against the hidden states that vision and text models return."""

import pytest
import tiny_models
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import fastembed


def vision(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "segformer":
        return transformers.SegformerModel(transformers.SegformerConfig(**tiny_models.SEGFORMER)).eval()
    return transformers.ViTModel(transformers.ViTConfig(**tiny_models.IMAGE)).eval()


@torch.no_grad()
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("final_norm", [True, False])
def test_patches_of_a_vision_transformer(normalize: bool, final_norm: bool) -> None:
    model = vision("vit")
    outputs = model(**tiny_models.pixels(), output_hidden_states=True)
    exits = [(0, 64), (2, 16), (2, 48), (3, 64)]
    ours = fastembed.dense_exits(model, exits, normalize=normalize, final_norm=final_norm, **tiny_models.pixels())
    assert list(ours) == exits
    for layer, dim in exits:
        hidden = outputs.last_hidden_state if layer == 3 else outputs.hidden_states[layer]
        if final_norm and layer < 3:
            hidden = model.layernorm(hidden)
        expected = hidden[..., :dim]
        torch.testing.assert_close(ours[layer, dim], F.normalize(expected, dim=-1) if normalize else expected)


@torch.no_grad()
def test_stages_of_segformer() -> None:
    model = vision("segformer")
    maps = model(**tiny_models.pixels(), output_hidden_states=True).hidden_states
    exits = [(1, 16), (2, 20), (3, 64)]
    ours = fastembed.dense_exits(model, exits, **tiny_models.pixels())
    for (layer, dim), embeddings in ours.items():
        expected = F.normalize(maps[layer - 1][:, :dim], dim=1).flatten(2).transpose(1, 2)
        torch.testing.assert_close(embeddings, expected)
    pooled = fastembed.MultiExitEncoder(model, [(1, 16), (3, 64)])(**tiny_models.pixels())
    torch.testing.assert_close(pooled[1, 16], F.normalize(maps[0].mean((2, 3)), dim=1))


def test_tokens_of_a_text_encoder_with_gradients() -> None:
    model, inputs = tiny_models.encoder(), tiny_models.batch()
    ours = fastembed.dense_exits(model, [(1, 32)], **inputs)[1, 32]
    hidden = model(**inputs, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(ours, F.normalize(hidden[..., :32], dim=-1))
    weight = model.encoder.layer[0].output.dense.weight
    weights = torch.linspace(-1, 1, ours.numel()).view(ours.shape)
    ours_grad, grad = (
        torch.autograd.grad((embeddings * weights).sum(), weight)[0]
        for embeddings in (ours, F.normalize(hidden[..., :32], dim=-1))
    )
    torch.testing.assert_close(ours_grad, grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("exits", "error", "message"),
    [
        ([], ValueError, "exits must be a list of at least one"),
        ([3], TypeError, r"exits must be pairs of ints \(layer, dim\), got 3"),
        ([(4, 16)], ValueError, r"exits must name layers 0 \(the embeddings\) to 3, got \(4, 16\)"),
        ([(1, 17)], ValueError, r"exits must have dims of 1 to 16 at layer 1, got \(1, 17\)"),
        ([(2, 0)], ValueError, "exits must have dims of 1 to 32 at layer 2"),
        ([(2, 8), (2, 8)], ValueError, r"exits must not repeat, got \(2, 8\) twice"),
    ],
)
def test_bad_exits(exits: list, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastembed.dense_exits(vision("segformer"), exits, **tiny_models.pixels())


def test_bad_models() -> None:
    with pytest.raises(TypeError, match="model must be a torch"):
        fastembed.dense_exits("vit", [(1, 8)])
    with pytest.raises(ValueError, match=r"pass layers='\.\.\.'"):
        fastembed.dense_exits(nn.Linear(3, 3), [(1, 8)])
