"""MultiExitEncoder against the hidden states that the models themselves return."""

import copy
import pickle
import threading

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from tiny_models import DECODER, IMAGE, T5, TEXT
from torch import nn

import fastembed
from fastembed import MultiExitEncoder, pool_exits
from fastembed.integrations.prompts import FromToken, OnlyTokens
from fastembed.nn import LayerMix

# Model, and the config it is made from. Those of tests/tiny_models.py come on top.
MODELS = {
    "t5": (transformers.T5EncoderModel, transformers.T5Config(**T5)),
    "starcoder2": (transformers.Starcoder2Model, transformers.Starcoder2Config(**DECODER)),
    "mistral": (transformers.MistralModel, transformers.MistralConfig(**DECODER)),
    "llama": (transformers.LlamaModel, transformers.LlamaConfig(**DECODER)),
    "qwen2": (transformers.Qwen2Model, transformers.Qwen2Config(**DECODER)),
    "clip text": (transformers.CLIPTextModel, transformers.CLIPTextConfig(**TEXT, bos_token_id=2, eos_token_id=3)),
    "clip vision": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig(**IMAGE)),
    "siglip vision": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig(**IMAGE)),
    "vit": (transformers.ViTModel, transformers.ViTConfig(**IMAGE)),
    # Layers that run several times, tokens as the first axis, and norms of other names behind the last layer.
    "albert": (transformers.AlbertModel, transformers.AlbertConfig(**TEXT, embedding_size=32)),
    "albert, groups": (
        transformers.AlbertModel,
        transformers.AlbertConfig(**{**TEXT, "num_hidden_layers": 4}, embedding_size=32, num_hidden_groups=2),
    ),
    "xlnet": (
        transformers.XLNetModel,
        transformers.XLNetConfig(vocab_size=100, d_model=64, n_layer=3, n_head=4, d_inner=96, pad_token_id=0),
    ),
    "megatron bert": (transformers.MegatronBertModel, transformers.MegatronBertConfig(**TEXT)),
    "dinov3": (transformers.DINOv3ViTModel, transformers.DINOv3ViTConfig(**IMAGE)),
    "roberta, norms first": (transformers.RobertaPreLayerNormModel, transformers.RobertaPreLayerNormConfig(**TEXT)),
}
VISION = ("clip vision", "siglip vision", "vit", "dinov3")
ARCHITECTURES = [*tiny_models.CONFIGS, *MODELS]


def build(architecture: str) -> nn.Module:
    if architecture in tiny_models.CONFIGS:
        return tiny_models.encoder(architecture)
    model, config = MODELS[architecture]
    torch.manual_seed(0)
    built = model(config).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith("bias"):  # all zeros otherwise, which hides a lost norm
                parameter.normal_(std=0.1)
    return built


def inputs_of(architecture: str) -> dict[str, torch.Tensor]:
    if architecture in VISION:
        return tiny_models.pixels()
    return tiny_models.batch()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_exit_is_the_pooled_hidden_state(architecture: str) -> None:
    model, inputs = build(architecture), inputs_of(architecture)
    depth = model.config.num_hidden_layers
    exits = [(layer, dim) for layer in range(depth + 1) for dim in (16, 64)]
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
        embeddings = MultiExitEncoder(model, exits)(**inputs)
    hidden = [*outputs.hidden_states[:depth], outputs.last_hidden_state]
    pooled = pool_exits(list(hidden), inputs.get("attention_mask"), dims=[16, 64])
    assert list(embeddings) == exits
    for layer, dim in exits:
        assert torch.equal(embeddings[layer, dim], pooled[layer][dim]), (layer, dim)


@pytest.mark.parametrize("architecture", ["modernbert", "t5", "starcoder2", "llama"])
def test_final_norm_makes_an_exit_what_a_shorter_model_gives(architecture: str) -> None:
    model, inputs = build(architecture), inputs_of(architecture)
    shorter = copy.deepcopy(model)
    stack = shorter.encoder if architecture == "t5" else shorter
    layers = "block" if architecture == "t5" else "layers"
    setattr(stack, layers, getattr(stack, layers)[:1])
    shorter.config.num_hidden_layers = 1
    with torch.no_grad():
        expected = pool_exits([shorter(**inputs).last_hidden_state], inputs["attention_mask"])[0][64]
        plain = MultiExitEncoder(model, [(1, 64)])(**inputs)[1, 64]
        normed = MultiExitEncoder(model, [(1, 64)], final_norm=True)(**inputs)[1, 64]
    torch.testing.assert_close(normed, expected)
    assert not torch.allclose(plain, expected, atol=1e-3)


def test_stops_after_the_last_exit_asked_for() -> None:
    model = tiny_models.encoder(num_hidden_layers=4)
    ran: list[int] = []
    for number, layer in enumerate(model.encoder.layer, start=1):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    encoder = MultiExitEncoder(model, [(1, 32), (2, 64), (4, 64)])
    encoder([(2, 64)], **tiny_models.batch())
    assert ran == [1, 2]
    ran.clear()
    encoder(**tiny_models.batch())
    assert ran == [1, 2, 3, 4]


def test_observes_a_forward_pass_that_others_make() -> None:
    model, inputs = tiny_models.encoder(), tiny_models.batch()
    encoder = MultiExitEncoder(model, [(0, 8), (1, 64)])
    with torch.no_grad(), encoder.observe(inputs["attention_mask"]) as embeddings:
        output = model(**inputs)
    with torch.no_grad():
        expected, whole = encoder(**inputs), model(**inputs)
    assert torch.equal(output.last_hidden_state, whole.last_hidden_state)
    assert {exit: embedding.tolist() for exit, embedding in embeddings.items()} == {
        exit: embedding.tolist() for exit, embedding in expected.items()
    }
    with pytest.raises(RuntimeError, match="BertModel must run inside the block of observe"), encoder.observe():
        pass
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.encoder.layer)


@pytest.mark.filterwarnings("ignore:Dynamo does not know")
def test_a_compiled_model_runs_as_it_is_and_its_layers_compiled() -> None:
    """The hooks that take the exits are not in what was compiled before."""
    model, inputs = tiny_models.encoder(), tiny_models.batch()
    with torch.no_grad():
        expected = MultiExitEncoder(model, [(1, 64)])(**inputs)[1, 64]
        compiled = torch.compile(model, backend="eager")
        compiled(**inputs)
        assert torch.equal(MultiExitEncoder(compiled, [(1, 64)])(**inputs)[1, 64], expected)
        model.compile(backend="eager")
        model(**inputs)
        encoder = MultiExitEncoder(model, [(1, 64)])
        assert torch.equal(encoder(**inputs)[1, 64], expected)
        with pytest.raises(RuntimeError, match="only single layers may be compiled"):
            torch.compile(encoder, backend="eager")(**inputs)


def test_leaves_no_hooks_behind() -> None:
    model = tiny_models.encoder()
    MultiExitEncoder(model, [(1, 64)])(**tiny_models.batch())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.encoder.layer)
    with pytest.raises(IndexError):
        MultiExitEncoder(model, [(1, 64)])(input_ids=torch.tensor([[1000]]))
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.encoder.layer)


def test_keeps_no_hidden_states() -> None:
    model = tiny_models.encoder(num_hidden_layers=4)
    alive: list[int] = []
    layers: list = []
    import weakref

    def watch(_module: nn.Module, _args: object, output: object) -> None:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        layers.append(weakref.ref(hidden))
        alive.append(sum(reference() is not None for reference in layers))

    encoder = MultiExitEncoder(model, [(layer, 64) for layer in range(5)])
    for layer in model.encoder.layer:
        layer.register_forward_hook(watch)
    with torch.inference_mode():
        encoder(**tiny_models.batch())
    assert max(alive) <= 2  # a layer's input and its output


def test_gradients_reach_the_model_from_every_exit() -> None:
    model = tiny_models.encoder().double()
    inputs = tiny_models.batch()
    embeddings = MultiExitEncoder(model, [(0, 16), (1, 32), (2, 64)])(**inputs)
    sum(embedding.square().sum() * embedding.shape[1] + embedding.sum() for embedding in embeddings.values()).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    hidden = model(**inputs, output_hidden_states=True).hidden_states
    mask = inputs["attention_mask"][..., None].double()
    total = torch.zeros((), dtype=torch.float64)
    for layer, dim in ((0, 16), (1, 32), (2, 64)):
        mean = (hidden[layer] * mask).sum(1) / mask.sum(1)
        unit = nn.functional.normalize(mean[:, :dim], dim=1)
        total = total + unit.square().sum() * dim + unit.sum()
    total.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(ours[name], grad)


@pytest.mark.parametrize("mode", ["mean", "mean_sqrt_len", "max", "weightedmean", "cls", "lasttoken"])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_heads(mode: str, kind: str) -> None:
    model, inputs = tiny_models.encoder(), tiny_models.batch()
    torch.manual_seed(3)
    head = nn.Linear(64, 24) if kind == "linear" else nn.Sequential(nn.Linear(64, 24), nn.Tanh())
    with torch.no_grad():
        embeddings = MultiExitEncoder(model, [(1, 16), (1, 24), (2, 64)], heads={1: head}, mode=mode)(**inputs)
        hidden = model(**inputs, output_hidden_states=True).hidden_states
        expected = pool_exits([head(hidden[1])], inputs["attention_mask"], mode=mode, dims=[16, 24])[0]
    torch.testing.assert_close(embeddings[1, 16], expected[16])
    torch.testing.assert_close(embeddings[1, 24], expected[24])


def test_a_head_leaves_an_empty_row_zero() -> None:
    inputs = tiny_models.batch()
    inputs["attention_mask"][2] = 0
    with torch.no_grad():
        encoder = MultiExitEncoder(tiny_models.encoder(), [(1, 24)], heads={1: nn.Linear(64, 24)}, normalize=False)
        embedding = encoder(**inputs)[1, 24]
    assert not embedding[2].any()
    assert embedding[[0, 1, 3, 4]].any(dim=1).all()


@pytest.fixture
def pipeline(tmp_path):
    return tiny_models.sentence_transformer(tmp_path)


def test_encode_agrees_with_sentence_transformers(pipeline) -> None:
    texts = tiny_models.texts(9)
    encoder = MultiExitEncoder(pipeline, [(1, 16), (2, 64)])
    ours = encoder.encode(texts, batch_size=4)
    np.testing.assert_allclose(ours[2, 64], pipeline.encode(texts), atol=1e-6)
    assert encoder.encode(texts, exits=[(1, 16)]).keys() == {(1, 16)}
    np.testing.assert_allclose(ours[1, 16], encoder.encode(texts, exits=[(1, 16)])[1, 16], atol=1e-6)


def test_encode_of_a_swapped_model(pipeline) -> None:
    texts = tiny_models.texts(9)
    fastembed.swap(pipeline, quantize=fastembed.QuantConfig(bits=8))
    ours = MultiExitEncoder(pipeline, [(2, 64)]).encode(texts)[2, 64]
    np.testing.assert_allclose(ours, pipeline.encode(texts), atol=1e-5)


def test_encode_leaves_the_prompt_out_of_pooling(tmp_path) -> None:
    pipeline = tiny_models.sentence_transformer(tmp_path, include_prompt=False)
    pipeline.prompts = {"query": "query : "}
    texts = tiny_models.texts(5)
    encoder = MultiExitEncoder(pipeline)
    np.testing.assert_allclose(
        encoder.encode(texts, prompt_name="query")[2, 64], pipeline.encode(texts, prompt_name="query"), atol=1e-6
    )
    included = MultiExitEncoder(pipeline, include_prompt=True).encode(texts, prompt="query : ")[2, 64]
    assert np.abs(included - pipeline.encode(texts, prompt_name="query")).max() > 1e-3


def test_encode_takes_the_default_prompt(pipeline) -> None:
    pipeline.prompts, pipeline.default_prompt_name = {"query": "query : "}, "query"
    texts = tiny_models.texts(5)
    encoder = MultiExitEncoder(pipeline)
    for prompt in (None, ""):  # an empty one is none
        expected = pipeline.encode(texts, prompt=prompt)
        np.testing.assert_allclose(encoder.encode(texts, prompt=prompt)[2, 64], expected, atol=1e-6)
    np.testing.assert_allclose(encoder.sentence_transformer().encode(texts), pipeline.encode(texts), atol=1e-6)


def test_precisions(pipeline) -> None:
    texts = tiny_models.texts(5)
    encoder = MultiExitEncoder(pipeline, [(2, 60)])
    full = encoder.encode(texts)[2, 60]
    assert full.dtype == np.float32
    half = encoder.encode(texts, precision="float16")[2, 60]
    np.testing.assert_array_equal(half, full.astype(np.float16))
    bits = encoder.encode(texts, precision="ubinary")[2, 60]
    np.testing.assert_array_equal(bits, np.packbits(full > 0, axis=1))
    codes = encoder.encode(texts, precision="int8")[2, 60]
    assert codes.dtype == np.int8
    cosines = (codes * full).sum(1) / np.linalg.norm(codes.astype(np.float32), axis=1)
    assert cosines.min() > 0.999


def test_one_text_and_tensors(pipeline) -> None:
    encoder, texts = MultiExitEncoder(pipeline, [(1, 16), (2, 64)]), tiny_models.texts()
    expected = encoder.encode(texts[:1])
    assert {exit: row.shape for exit, row in encoder.encode(texts[0]).items()} == {(1, 16): (16,), (2, 64): (64,)}
    for exit, row in encoder.encode(texts[0], convert_to_tensor=True).items():
        assert isinstance(row, torch.Tensor)
        assert torch.equal(row, torch.from_numpy(expected[exit][0]))


def test_a_swapped_model_takes_a_large_batch_whole() -> None:
    """By itself it runs it in slices, of which an exit would see the first or the last."""
    model, inputs = tiny_models.encoder(), tiny_models.batch(60)
    fastembed.swap(model, verbose=False)
    encoder = MultiExitEncoder(model, [(1, 64), (2, 64)])
    with torch.no_grad():
        with encoder.observe(inputs["attention_mask"]) as embeddings:
            model(**inputs)
        by_rows = [encoder(**{name: x[row : row + 1] for name, x in inputs.items()}) for row in range(60)]
        for exit, embedding in encoder(**inputs).items():
            torch.testing.assert_close(embedding, torch.cat([row[exit] for row in by_rows]), atol=1e-5, rtol=0)
            assert torch.equal(embedding, embeddings[exit])


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "ubinary"])
def test_no_texts(pipeline, precision: str) -> None:
    embeddings = MultiExitEncoder(pipeline, [(1, 20)]).encode([], precision=precision)
    assert embeddings[1, 20].shape == (0, 3 if precision == "ubinary" else 20)


def test_encode_keeps_the_training_mode(pipeline) -> None:
    encoder = MultiExitEncoder(pipeline).train()
    first = encoder.encode(tiny_models.texts())
    assert encoder.training
    assert encoder.model.training
    np.testing.assert_array_equal(first[2, 64], encoder.encode(tiny_models.texts())[2, 64])


def test_threads_do_not_see_each_other(pipeline) -> None:
    texts = tiny_models.texts(8)
    encoder = MultiExitEncoder(pipeline, [(0, 8), (1, 16), (2, 64)])
    expected = encoder.encode(texts)
    failures: list[object] = []

    def run(exit: tuple[int, int]) -> None:
        for _ in range(10):
            got = encoder.encode(texts, exits=[exit])[exit]
            if not np.allclose(got, expected[exit], atol=1e-6):
                failures.append(exit)

    threads = [threading.Thread(target=run, args=(exit,)) for exit in encoder.exits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_deepcopy_and_pickle(pipeline) -> None:
    encoder = MultiExitEncoder(pipeline, [(1, 16)])
    texts = tiny_models.texts()
    expected = encoder.encode(texts)[1, 16]
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        np.testing.assert_array_equal(other.encode(texts)[1, 16], expected)
        other.model.encoder.layer[0] = nn.Identity()
    np.testing.assert_array_equal(encoder.encode(texts)[1, 16], expected)


@pytest.mark.parametrize("exit", [(0, 64), (1, 64), (1, 16), (2, 32)])
def test_an_exit_as_a_sentence_transformer_saves_and_loads(pipeline, tmp_path, exit: tuple[int, int]) -> None:
    encoder = MultiExitEncoder(pipeline, [exit, (2, 64)])
    texts = tiny_models.texts()
    expected = encoder.encode(texts)[exit]
    shorter = encoder.sentence_transformer(exit)
    assert len(shorter[0].auto_model.encoder.layer) == exit[0]
    assert shorter.get_embedding_dimension() == exit[1]
    np.testing.assert_allclose(shorter.encode(texts), expected, atol=1e-6)
    parameter = next(shorter.parameters())
    assert any(parameter is other for other in pipeline.parameters())
    shorter.save(str(tmp_path / "saved"))
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu", local_files_only=True)
    np.testing.assert_allclose(loaded.encode(texts), expected, atol=1e-6)
    assert len(pipeline[0].auto_model.encoder.layer) == 2


def test_a_saved_exit_pads_on_the_same_side(pipeline, tmp_path) -> None:
    pipeline.tokenizer.padding_side = "left"
    texts = tiny_models.texts(5)
    encoder = MultiExitEncoder(pipeline, [(1, 64)])
    encoder.sentence_transformer().save(str(tmp_path / "exit"))
    loaded = SentenceTransformer(str(tmp_path / "exit"))
    np.testing.assert_allclose(loaded.encode(texts), encoder.encode(texts)[1, 64], atol=1e-6)


@pytest.mark.parametrize("exit", [(2, 192), (1, 100)])
def test_a_pipeline_of_several_modes(tmp_path, exit: tuple[int, int]) -> None:
    pipeline = tiny_models.sentence_transformer(tmp_path, ("cls", "max", "mean"))
    texts = tiny_models.texts(5)
    encoder = MultiExitEncoder(pipeline, [(1, 100), (2, 192)])
    np.testing.assert_allclose(encoder.encode(texts)[2, 192], pipeline.encode(texts), atol=1e-6)
    encoder.sentence_transformer(exit).save(str(tmp_path / "exit"))
    loaded = SentenceTransformer(str(tmp_path / "exit"))
    np.testing.assert_allclose(loaded.encode(texts), encoder.encode(texts)[exit], atol=1e-6)


@pytest.mark.parametrize("mode", ["max", ("cls", "mean")])
def test_a_head_on_tokens_is_no_sentence_transformer(pipeline, mode: str | tuple[str, ...]) -> None:
    encoder = MultiExitEncoder(pipeline, [(1, 16)], mode=mode, heads={1: nn.Linear(64, 16)})
    with pytest.raises(ValueError, match="must have a head that acts on the pooled vector"):
        encoder.sentence_transformer()


def test_an_exit_with_a_head_as_a_sentence_transformer(pipeline, tmp_path) -> None:
    encoder = MultiExitEncoder(pipeline, [(1, 16)], heads={1: nn.Linear(64, 24)})
    texts = tiny_models.texts()
    encoder.sentence_transformer().save(str(tmp_path / "saved"))
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu", local_files_only=True)
    np.testing.assert_allclose(loaded.encode(texts), encoder.encode(texts)[1, 16], atol=1e-6)


def test_a_transformers_model_with_its_tokenizer(pipeline) -> None:
    texts = tiny_models.texts()
    encoder = MultiExitEncoder(pipeline[0].auto_model, tokenizer=pipeline.tokenizer, max_length=8)
    pipeline.max_seq_length = 8
    np.testing.assert_allclose(encoder.encode(texts)[2, 64], pipeline.encode(texts), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exits": []}, "exits must be a list of at least one"),
        ({"exits": [(3, 64)]}, "exits must name layers 0 .* to 2, got \\(3, 64\\)"),
        ({"exits": [(-1, 64)]}, "exits must name layers"),
        ({"exits": [(1, 0)]}, "exits must have dims of 1 to 64 at layer 1, got \\(1, 0\\)"),
        ({"exits": [(1, 65)]}, "exits must have dims of 1 to 64"),
        ({"exits": [(1, 8), (1, 8)]}, "exits must not repeat, got \\(1, 8\\) twice"),
        ({"mode": "median"}, "mode must be one of"),
        ({"layers": "encoder"}, "layers must be the attribute path of a ModuleList"),
        ({"heads": {1: nn.Linear(64, 8)}}, "heads must belong to layers with an exit, got one for layer 1"),
        ({"heads": {2: nn.Linear(32, 8)}}, "heads must take the model's 64 features, got one of 32"),
        ({"heads": {9: nn.Linear(64, 8)}}, r"heads must be for layers 0 \(the embeddings\) to 2, got one for 9"),
        (
            {"heads": {2: nn.Sequential(nn.Linear(32, 8), nn.ReLU())}},
            "heads must take the model's 64 features, and that of layer 2 fails on them",
        ),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiExitEncoder(tiny_models.encoder(), **arguments)


def test_bad_types() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        MultiExitEncoder("bert")
    with pytest.raises(TypeError, match=r"exits must be pairs of ints \(layer, dim\), got 3"):
        MultiExitEncoder(tiny_models.encoder(), [3])
    with pytest.raises(TypeError, match="tokenizer must be a transformers tokenizer, got str"):
        MultiExitEncoder(tiny_models.encoder(), tokenizer="bert")
    with pytest.raises(TypeError, match="heads must map layers to modules"):
        MultiExitEncoder(tiny_models.encoder(), heads={1: 3})
    for argument in ("heads", "mixes"):
        with pytest.raises(TypeError, match=f"{argument} must be a dict by layer, got list"):
            MultiExitEncoder(tiny_models.encoder(), **{argument: [nn.Linear(64, 8)]})


def test_a_model_whose_layers_cannot_be_found() -> None:
    with pytest.raises(ValueError, match=r"a config with num_hidden_layers, and Linear has none: pass layers='\.\.\.'"):
        MultiExitEncoder(nn.Linear(3, 3))
    model = tiny_models.encoder()
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match=r"a ModuleList of its 5 layers, and BertModel has none: pass layers='\.\.\.'"):
        MultiExitEncoder(model)
    lists_of_parts = transformers.XLMModel(transformers.XLMConfig(emb_dim=64, n_layers=3, n_heads=4, n_words=100))
    with pytest.raises(ValueError, match=r"has several side by side.*\(attentions, layer_norm1, ffns, layer_norm2\)"):
        MultiExitEncoder(lists_of_parts)
    two_towers = transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=IMAGE))
    with pytest.raises(ValueError, match=r"pass one of its parts: text_model \(CLIPTextModel\), vision_model"):
        MultiExitEncoder(two_towers)


def test_exits_of_a_hierarchy_have_the_width_of_their_stage() -> None:
    sizes = {"hidden_sizes": [16, 32], "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [4, 2]}
    config = transformers.SegformerConfig(
        **sizes, patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2]
    )
    model = transformers.SegformerModel(config).eval()
    encoder = MultiExitEncoder(model, [(1, 16), (2, 32)], heads={1: nn.Linear(16, 24)})
    shapes = [tuple(x.shape) for x in encoder(**inputs_of("vit")).values()]
    assert shapes == [(3, 16), (3, 32)]
    with pytest.raises(ValueError, match=r"exits must have dims of 1 to 16 at layer 1, got \(1, 32\)"):
        MultiExitEncoder(model, [(1, 32)])
    with pytest.raises(ValueError, match=r"heads must take the model's 16 features, got one of 32 for layer 1"):
        MultiExitEncoder(model, [(1, 8)], heads={1: nn.Linear(32, 8)})
    with pytest.raises(ValueError, match=r"exits must mix layers of one width, got \(\(1, 2\), 8\), of \[16, 32\]"):
        MultiExitEncoder(model, [((1, 2), 8)])


def test_bad_calls(pipeline) -> None:
    encoder = MultiExitEncoder(pipeline, [(1, 16)])
    with pytest.raises(ValueError, match=r"exits must be of this encoder's, \[\(1, 16\)\], got \(2, 64\)"):
        encoder.encode(["w1"], exits=[(2, 64)])
    for texts, got in ((None, "NoneType"), ((text for text in ["w1"]), "generator"), ({"w1": 1}, "dict")):
        with pytest.raises(TypeError, match=f"texts must be a string or a list of strings, got {got}"):
            encoder.encode(texts)
    with pytest.raises(TypeError, match="texts must be strings, got int at position 1"):
        encoder.encode(["w1", 2])
    with pytest.raises(TypeError, match="prompt must be a string, got int"):
        encoder.encode(["w1"], prompt=3)
    with pytest.raises(ValueError, match="precision must be one of float32"):
        encoder.encode(["w1"], precision="int4")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        encoder.encode(["w1"], batch_size=0)
    with pytest.raises(ValueError, match="prompt_name must be one of none, got 'query'"):
        encoder.encode(["w1"], prompt_name="query")
    ids = torch.tensor([[1, 2]])
    with pytest.raises(
        ValueError, match=r"attention_mask must be \[B, T\] or \[B, 1, 1, T\], got shape \[1, 1, 2, 2\]"
    ):
        encoder(input_ids=ids, attention_mask=torch.ones(1, 1, 2, 2))
    for wrong, got in ((ids, r"torch.int64 \[1, 2\]"), (ids[:, :1] > 0, r"torch.bool \[1, 1\]"), (3, "int")):
        choosing = MultiExitEncoder(pipeline, [(1, 16)], select=lambda _, wrong=wrong: wrong)
        with pytest.raises(ValueError, match=rf"select must return a bool tensor \[1, 2\], as input_ids, got {got}"):
            choosing(input_ids=ids)
    with pytest.raises(ValueError, match="prompt_length must be at least 0, got -1"):
        encoder(input_ids=torch.tensor([[1, 2]]), prompt_length=-1)
    with pytest.raises(ValueError, match="tokenizer must be given"):
        MultiExitEncoder(pipeline[0].auto_model).encode(["w1"])


def test_pipelines_that_do_more_than_pool(pipeline) -> None:
    pipeline.append(Dense(64, 16))
    with pytest.raises(ValueError, match="model must be a SentenceTransformer of a Transformer, a Pooling"):
        MultiExitEncoder(pipeline)


def test_layers_that_share_their_weights_are_cut_off(pipeline, tmp_path) -> None:
    encoder = MultiExitEncoder(build("albert"), [(2, 16), (3, 64)], tokenizer=pipeline.tokenizer)
    encoder.sentence_transformer((2, 16)).save(str(tmp_path / "two"))
    loaded, texts = SentenceTransformer(str(tmp_path / "two"), device="cpu"), tiny_models.texts()
    assert loaded[0].auto_model.config.num_hidden_layers == 2
    np.testing.assert_allclose(loaded.encode(texts), encoder.encode(texts)[2, 16], atol=1e-6)
    groups = MultiExitEncoder(build("albert, groups"), [(2, 16)], tokenizer=pipeline.tokenizer)
    with pytest.raises(ValueError, match="AlbertModel shares them in 2 groups"):
        groups.sentence_transformer()


def test_a_shorter_model_without_its_final_norm_is_refused(pipeline) -> None:
    encoder = MultiExitEncoder(build("llama"), [(1, 64), (3, 64)], tokenizer=pipeline.tokenizer)
    with pytest.raises(ValueError, match="final_norm=True"):
        encoder.sentence_transformer((1, 64))


MIXED = ((0, 2), 32)


def test_exits_of_several_layers_are_mixed() -> None:
    """Their average, as SimCSE's first-last average, or by the weights of a LayerMix, as surface fusion has them."""
    model, inputs = tiny_models.encoder(), tiny_models.batch()
    surface = LayerMix([0.2, 0.8])
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states
        encoder = MultiExitEncoder(model, [((1, 2), 64), (1, 16), MIXED, ((2, 0), 64)], mixes={(0, 2): surface})
        embeddings = encoder(**inputs)
        pooled = [p[64] for p in pool_exits(list(hidden), inputs["attention_mask"], normalize=False)]
    assert list(embeddings) == list(encoder.exits)
    unit = nn.functional.normalize
    torch.testing.assert_close(embeddings[(1, 2), 64], unit((pooled[1] + pooled[2]) / 2))
    torch.testing.assert_close(embeddings[MIXED], unit((0.2 * pooled[0] + 0.8 * pooled[2])[:, :32]))
    torch.testing.assert_close(embeddings[(2, 0), 64], unit((pooled[0] + pooled[2]) / 2))
    torch.testing.assert_close(embeddings[1, 16], unit(pooled[1][:, :16]))


def test_a_learned_mix_is_trained_with_the_model() -> None:
    mix = LayerMix(3, trainable=True)
    encoder = MultiExitEncoder(tiny_models.encoder(), [((0, 1, 2), 64)], mixes={(0, 1, 2): mix})
    encoder(**tiny_models.batch())[(0, 1, 2), 64].sum().backward()
    assert mix.logits.grad is not None
    assert mix.logits.grad.abs().sum() > 0
    assert "mixes.0_1_2.logits" in encoder.state_dict()


def test_encode_mixes_in_every_precision(pipeline) -> None:
    texts = tiny_models.texts(5)
    encoder = MultiExitEncoder(pipeline, [MIXED])
    full = encoder.encode(texts)[MIXED]
    np.testing.assert_array_equal(encoder.encode(texts, precision="ubinary")[MIXED], np.packbits(full > 0, axis=1))
    assert encoder.encode([], precision="int8")[MIXED].shape == (0, 32)


def test_the_mask_as_attention_layers_take_it() -> None:
    inputs = tiny_models.batch()
    encoder = MultiExitEncoder(tiny_models.encoder(), [(1, 32), (2, 64)])
    extended = {**inputs, "attention_mask": inputs["attention_mask"][:, None, None].bool()}
    with torch.no_grad():
        for exit, embedding in encoder(**inputs).items():
            torch.testing.assert_close(encoder(**extended)[exit], embedding)


def test_pools_only_the_selected_tokens(pipeline) -> None:
    inputs = tiny_models.batch()
    ids = inputs["input_ids"]
    separator = int(ids[1, 2])
    model = tiny_models.encoder()
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
        for select, expected in (
            (FromToken(separator), lambda row: _from(row, separator)),
            (OnlyTokens((separator,)), lambda row: row == separator),
        ):
            mask = torch.stack([expected(row) for row in ids]) & inputs["attention_mask"].bool()
            ours = MultiExitEncoder(model, select=select)(**inputs)[2, 64]
            torch.testing.assert_close(ours, pool_exits([hidden], mask)[0][64], rtol=0, atol=0)
    with pytest.raises(ValueError, match="inputs must have input_ids for select to choose from, got inputs_embeds"):
        MultiExitEncoder(model, select=FromToken(separator))(inputs_embeds=torch.zeros(1, 2, 64))
    with pytest.raises(ValueError, match=r"exit \(2, 64\) must be of one layer and all tokens"):
        MultiExitEncoder(pipeline, select=FromToken(separator)).sentence_transformer()


def _from(row: torch.Tensor, token: int) -> torch.Tensor:
    if not (row == token).any():
        return torch.ones_like(row, dtype=torch.bool)
    return torch.arange(len(row)) >= int((row == token).nonzero()[0])


def test_several_modes_side_by_side() -> None:
    model, inputs = tiny_models.encoder(), tiny_models.batch()
    with torch.no_grad():
        encoder = MultiExitEncoder(model, mode=["mean", "max"])
        hidden = model(**inputs).last_hidden_state
        expected = pool_exits([hidden], inputs["attention_mask"], mode=["mean", "max"])[0][128]
        assert torch.equal(encoder(**inputs)[2, 128], expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"exits": [((1, 3), 64)]}, ValueError, "exits must name layers 0"),
        ({"exits": [((1, 1), 64)]}, ValueError, "exits must not repeat a layer"),
        ({"exits": [((), 64)]}, TypeError, "exits must be pairs of ints"),
        ({"exits": [((1, 2), 65)]}, ValueError, "exits must have dims of 1 to 64"),
        ({"mixes": {(1, 2): LayerMix(2)}}, ValueError, "mixes must belong to layers with an exit"),
        ({"exits": [MIXED], "mixes": {(0, 2): LayerMix(3)}}, ValueError, "mixes must have a weight per layer, got 3"),
        ({"exits": [MIXED], "mixes": {(0, 2): nn.Linear(2, 2)}}, TypeError, "mixes must map layers to LayerMix"),
        ({"select": 3}, TypeError, "select must be a function of input_ids, got int"),
        ({"mode": []}, TypeError, "mode must be a string or a list"),
    ],
)
def test_bad_mixes_and_selections(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MultiExitEncoder(tiny_models.encoder(), **arguments)
