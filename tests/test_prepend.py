"""Token prepending against a decoder written out layer by layer."""

import threading

import pytest
import tiny_models
import torch
import transformers
from torch import Tensor, nn

import fastembed
from fastembed import MultiExitEncoder

PLACEHOLDER = 5
START, EXIT = 1, 3
_SIZES = {**tiny_models.DECODER, "num_hidden_layers": 5}

DECODERS = {
    "llama": (transformers.LlamaModel, transformers.LlamaConfig(**_SIZES)),
    "mistral": (transformers.MistralModel, transformers.MistralConfig(**_SIZES, sliding_window=None)),
    "qwen2": (transformers.Qwen2Model, transformers.Qwen2Config(**_SIZES)),
    "qwen3": (transformers.Qwen3Model, transformers.Qwen3Config(**_SIZES, head_dim=16)),
    "starcoder2": (transformers.Starcoder2Model, transformers.Starcoder2Config(**_SIZES)),
    "gemma": (transformers.GemmaModel, transformers.GemmaConfig(**_SIZES, head_dim=16)),
    "gemma2": (transformers.Gemma2Model, transformers.Gemma2Config(**_SIZES, head_dim=16, query_pre_attn_scalar=16)),
}


def decoder(name: str) -> nn.Module:
    model, config = DECODERS[name]
    torch.manual_seed(0)
    return model(config).eval()


def batch(side: str = "left", placeholder: int = PLACEHOLDER) -> dict[str, Tensor]:
    """Rows of different lengths, each with the placeholder at another place."""
    rows = tiny_models.batch()
    for row, position in enumerate((2, 0, 3, 1, 2)):
        rows["input_ids"][row, position] = placeholder
    return tiny_models.left_padded(rows) if side == "left" else rows


def written_out(model: nn.Module, inputs: dict[str, Tensor], row: Tensor | None = None) -> list[Tensor]:
    """Hidden states [B, T, D] of left-padded rows after every layer, as the paper's code computes them."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    length = ids.shape[1]
    found = ids == PLACEHOLDER if row is None else ids == 100
    hidden = model.embed_tokens(ids if row is None else ids * ~found)
    if row is not None:
        scale = 64**0.5 if model.config.model_type in ("gemma", "gemma2") else 1  # Gemma scales what it looks up
        hidden = torch.where(found[..., None], scale * row, hidden)
    positions = torch.arange(length)[None]
    rotary = model.rotary_emb(hidden, positions)
    visible = torch.ones(length, length).tril().bool() & mask[:, None].bool()
    visible |= torch.eye(length).bool()  # padding sees itself, or its softmax would be over nothing
    bias = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]
    states = []
    for number, layer in enumerate(model.layers):
        if START <= number < EXIT:
            for b in range(len(ids)):
                hidden[b, found[b].nonzero()[0, 0]] = hidden[b, length - 1]
        states.append(hidden.clone())
        hidden = layer(hidden, attention_mask=bias, position_ids=positions, position_embeddings=rotary)
    return [*states, model.norm(hidden)]


@torch.no_grad()
@pytest.mark.parametrize("output_layer", [4, -2, -1])
@pytest.mark.parametrize("name", DECODERS)
def test_is_the_method_written_out(name: str, output_layer: int) -> None:
    model, inputs = decoder(name), batch()
    expected = written_out(model, inputs)[output_layer][:, -1]
    with fastembed.prepend_token(
        model, PLACEHOLDER, start=START, exit=EXIT, output_layer=output_layer, normalize=False
    ) as encoder:
        ((exit, ours),) = encoder(**inputs).items()
    assert exit == (output_layer % 6, 64)
    torch.testing.assert_close(ours, expected)
    plain = MultiExitEncoder(model, [exit], mode="lasttoken", normalize=False)(**inputs)[exit]
    assert not torch.allclose(plain, expected, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma", "gemma2"])
def test_a_placeholder_outside_the_vocabulary(name: str) -> None:
    model, inputs = decoder(name), batch(placeholder=100)
    row = torch.randn(64, generator=torch.Generator().manual_seed(2))
    expected = written_out(model, inputs, row)[-2][:, -1]
    with fastembed.prepend_token(model, 100, start=START, exit=EXIT, embedding=row, normalize=False) as encoder:
        (ours,) = encoder(**inputs).values()
    torch.testing.assert_close(ours, expected)


@torch.no_grad()
def test_padding_may_stand_right_and_there_may_be_none() -> None:
    model = decoder("llama")
    left, right = batch("left"), batch("right")
    with fastembed.prepend_token(model, PLACEHOLDER, start=START, exit=EXIT) as encoder:
        (expected,) = encoder(**left).values()
        torch.testing.assert_close(next(iter(encoder(**right).values())), expected, rtol=1e-4, atol=1e-5)
        alone = encoder(input_ids=right["input_ids"][:1])
        torch.testing.assert_close(next(iter(alone.values())), expected[:1], rtol=1e-4, atol=1e-5)
        empty = {**left, "attention_mask": left["attention_mask"] * torch.tensor([[1], [1], [0], [1], [1]])}
        assert not next(iter(encoder(**empty).values()))[2].any()


def hooks_of(model: nn.Module) -> list[tuple[list, list]]:
    return [(list(module._forward_pre_hooks), list(module._forward_hooks)) for module in model.modules()]


@torch.no_grad()
def test_acts_on_whatever_runs_the_model_and_leaves_it_as_it_was() -> None:
    model, inputs = decoder("llama"), batch()
    before = model(**inputs).last_hidden_state
    model(**inputs, output_hidden_states=True)  # leaves hooks of transformers' own
    hooks = hooks_of(model)
    with fastembed.prepend_token(
        model, PLACEHOLDER, start=START, exit=EXIT, output_layer=-1, normalize=False
    ) as encoder:
        (embedding,) = encoder(**inputs).values()
        torch.testing.assert_close(model(inputs["input_ids"], inputs["attention_mask"])[0][:, -1], embedding)
        torch.testing.assert_close(model(**inputs, output_hidden_states=True).hidden_states[-1][:, -1], embedding)
        elsewhere: list[Tensor] = []
        thread = threading.Thread(target=lambda: elsewhere.append(model(**inputs).last_hidden_state))
        thread.start()
        thread.join()
    torch.testing.assert_close(elsewhere[0], before)
    assert torch.equal(model(**inputs).last_hidden_state, before)
    assert hooks_of(model) == hooks
    with pytest.raises(RuntimeError, match="stopped"), fastembed.prepend_token(model, PLACEHOLDER, exit=EXIT):
        raise RuntimeError("stopped")
    assert torch.equal(model(**inputs).last_hidden_state, before)


def test_a_language_model_and_gradients() -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES)).eval()
    inputs = batch()
    expected = written_out(model.model, inputs)[-2][:, -1]
    with fastembed.prepend_token(model, PLACEHOLDER, start=START, exit=EXIT, normalize=False) as encoder:
        (ours,) = encoder(**inputs).values()
        ours.sum().backward()
    torch.testing.assert_close(ours, expected)
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_encodes_texts(tmp_path) -> None:
    tokenizer = tiny_models.sentence_transformer(tmp_path).tokenizer
    tokenizer.padding_side = "left"
    model = decoder("qwen2")
    texts = [f"query {text}" for text in tiny_models.texts()]  # the placeholder is "query", 5
    with fastembed.prepend_token(model, PLACEHOLDER, start=START, exit=EXIT, tokenizer=tokenizer) as encoder:
        (embeddings,) = encoder.encode(texts).values()
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        (expected,) = encoder(**inputs).values()
    torch.testing.assert_close(torch.from_numpy(embeddings), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"start": 3, "exit": 3}, ValueError, "start must be below exit, got 3 and 3"),
        ({"start": -1, "exit": 3}, ValueError, "start must be between 0 and 4, got -1"),
        ({"exit": 6}, ValueError, "exit must be between 1 and 5, got 6"),
        ({"exit": 3, "output_layer": 6}, ValueError, "output_layer must be between -6 and 5, got 6"),
        ({"exit": 3, "token_id": 100}, ValueError, "token_id must be between 0 and 99, got 100"),
        ({"exit": 3, "token_id": "<PST>"}, TypeError, "token_id must be an integer, got '<PST>'"),
        ({"exit": 3, "embedding": [0.0] * 64}, TypeError, "embedding must be a tensor, got list"),
        ({"exit": 3, "embedding": torch.zeros(1, 64)}, ValueError, r"embedding must be \[64\], got shape \[1, 64\]"),
        ({"exit": 3, "layers": "blocks"}, ValueError, "layers must be the attribute path of a ModuleList"),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    model = decoder("llama")
    with pytest.raises(error, match=message), fastembed.prepend_token(model, **{"token_id": 5, **arguments}):
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_bad_models() -> None:
    with (
        pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"),
        fastembed.prepend_token("llama", 5),
    ):
        pass
    with pytest.raises(ValueError, match=r"pass layers='\.\.\.'"), fastembed.prepend_token(nn.Linear(3, 3), 5):
        pass
    albert = transformers.AlbertModel(transformers.AlbertConfig(hidden_size=64, num_attention_heads=4, vocab_size=100))
    with (
        pytest.raises(ValueError, match="model must be a decoder, whose layers run once each, got AlbertModel"),
        fastembed.prepend_token(albert, 5),
    ):
        pass


@torch.no_grad()
def test_bad_texts() -> None:
    model, inputs = decoder("llama"), batch()
    with fastembed.prepend_token(model, PLACEHOLDER, exit=EXIT) as encoder:
        twice, never = inputs["input_ids"].clone(), inputs["input_ids"].clone()
        twice[1, -1] = PLACEHOLDER
        never[3] = 9
        for ids, message in ((twice, "once in every row, got 2 in row 1"), (never, "got 0 in row 3")):
            with pytest.raises(ValueError, match=message):
                encoder(input_ids=ids, attention_mask=inputs["attention_mask"])
        with pytest.raises(ValueError, match=r"attention_mask must be \[B, T\] for token prepending, got shape"):
            model(inputs["input_ids"], attention_mask=torch.ones(5, 1, 24, 24))
        with pytest.raises(ValueError, match="input_ids must be given for token prepending, got embeddings"):
            model(inputs_embeds=torch.zeros(1, 4, 64))
