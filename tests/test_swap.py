"""swap and unswap: what is replaced, that nothing is lost, and that the model stays usable by its own API."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from sentence_transformers import SentenceTransformer
from torch import nn

import fastembed
from fastembed import QuantConfig
from fastembed.nn import LatentAttentionPooling, QuantLinear

EIGHT_BITS = QuantConfig(bits=8)


def swapped(model: nn.Module, *args: Any, **kwargs: Any) -> fastembed.SwapReport:
    return fastembed.swap(model, *args, verbose=False, **kwargs)


def snapshot(model: nn.Module) -> dict[str, int]:
    return {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}


@pytest.fixture
def model(tmp_path: Path) -> SentenceTransformer:
    return tiny_models.sentence_transformer(tmp_path)


@torch.no_grad()
def outputs(encoder: nn.Module, **kwargs: Any) -> Any:
    return encoder(**tiny_models.batch(), **kwargs)


@pytest.mark.parametrize("architecture", tiny_models.CONFIGS)
def test_every_architecture_keeps_its_output_and_comes_back_bit_for_bit(architecture: str) -> None:
    encoder = tiny_models.encoder(architecture)
    before, modules, state = outputs(encoder), snapshot(encoder), copy.deepcopy(encoder.state_dict())
    report = swapped(encoder, EIGHT_BITS)
    linears = [name for name, module in encoder.named_modules() if isinstance(module, QuantLinear)]
    assert [row.name for row in report.rows] == linears
    assert not report.left
    assert not any(type(module) is nn.Linear for module in encoder.modules())
    after = outputs(encoder)
    valid = tiny_models.batch()["attention_mask"].bool()
    cosines = torch.cosine_similarity(after.last_hidden_state[valid], before.last_hidden_state[valid], dim=-1)
    assert cosines.min() > 0.999
    fastembed.unswap(encoder)
    assert snapshot(encoder) == modules
    assert list(encoder.state_dict()) == list(state)
    assert all(torch.equal(encoder.state_dict()[name], tensor) for name, tensor in state.items())
    assert torch.equal(outputs(encoder).last_hidden_state, before.last_hidden_state)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "xlm-roberta", "mpnet", "distilbert", "electra"])
def test_gelu_moves_into_the_layer_before_it_and_changes_nothing(architecture: str) -> None:
    encoder = tiny_models.encoder(architecture)
    report = swapped(encoder, EIGHT_BITS)
    assert sum(row.kind == "linear + gelu" for row in report.rows) == 2
    fused = outputs(encoder).last_hidden_state
    for module in encoder.modules():  # undo the fusion alone
        for name, child in list(module.named_children()):
            if type(child).__name__ == "Absorbed":
                getattr(module, child.by).epilogue = None
                setattr(module, name, nn.GELU())
    torch.testing.assert_close(outputs(encoder).last_hidden_state, fused, rtol=1e-2, atol=2e-2)


def test_gelu_of_a_gated_unit_stays() -> None:
    assert {row.kind for row in swapped(tiny_models.encoder("modernbert")).rows} == {"linear"}


def test_an_activation_used_twice_or_on_something_else_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.act, self.seen = nn.Linear(32, 32), nn.GELU(), None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen = self.linear(x)
            return self.act(self.seen) + self.seen

    model = Twice()
    x = torch.randn(3, 32)
    expected = model(x)
    model.seen = None
    assert [row.kind for row in swapped(model).rows] == ["linear"]
    assert model.seen is None
    torch.testing.assert_close(model(x), expected, atol=0.05, rtol=0.05)


def test_a_layer_whose_weight_its_parent_reads_stays() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.out = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.up(x) @ self.down.weight
            return self.out(x.to(self.out.weight.dtype) if isinstance(self.out.weight, torch.Tensor) else x)

    model = Reads()
    x = torch.randn(3, 32)
    expected = model(x)
    report = swapped(model, EIGHT_BITS)
    assert [row.name for row in report.rows] == ["up", "out"]
    assert report.left == {"down": "Reads reads its weights itself"}
    torch.testing.assert_close(model(x), expected, atol=0.05, rtol=0.05)


def test_report_counts_actual_bytes(model: SentenceTransformer) -> None:
    tensors_before = {id(t): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    linears = {name: sum(p.nbytes for p in m.parameters()) for name, m in model.named_modules() if type(m) is nn.Linear}
    report = swapped(model, QuantConfig(bits=4))
    assert report.bytes_before == sum(tensors_before.values())
    assert report.bytes_after == sum({id(t): t.nbytes for t in [*model.parameters(), *model.buffers()]}.values())
    assert report.bytes_kept == sum(linears.values())
    quantised = dict(model.named_modules())
    rows = [row for row in report.rows if row.bits is not None]
    assert {row.name: row.bytes_before for row in rows} == linears
    for row in rows:
        assert row.bytes_after == sum(buffer.nbytes for buffer in quantised[row.name].buffers())
        assert 4 < row.bits < 6
    saved = report.bytes_before - report.bytes_after
    assert saved == sum(row.bytes_before - row.bytes_after for row in report.rows)


def test_report_reads_as_a_table(model: SentenceTransformer, capsys: pytest.CaptureFixture[str]) -> None:
    report = fastembed.swap(model, QuantConfig(skip=("pooler",)))
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    assert any(
        line.startswith("0.model.encoder.layer.{0-1}.intermediate.dense (2)") and "linear + gelu" in line
        for line in printed.splitlines()
    )
    assert "pooling + normalize" in printed
    assert "left as it is: 0.model.pooler.dense (skip)" in printed
    fastembed.unswap(model)
    swapped(model)
    assert capsys.readouterr().out == ""


MODES = ("mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean", ("cls", "mean"))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_pooling_modes_agree_with_sentence_transformers(
    tmp_path: Path, mode: str | tuple[str, ...], normalize: bool
) -> None:
    model = tiny_models.sentence_transformer(tmp_path, mode, normalize=normalize)
    expected = model.encode(tiny_models.texts(), convert_to_tensor=True)
    report = swapped(model, quantize=None)
    kind = "pooling + normalize" if normalize else "pooling"
    assert [row.kind for row in report.rows] == [kind]
    torch.testing.assert_close(model.encode(tiny_models.texts(), convert_to_tensor=True), expected)
    assert model.get_embedding_dimension() == expected.shape[1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_pooling_without_the_prompt(tmp_path: Path, mode: str | tuple[str, ...], padding_side: str) -> None:
    model = tiny_models.sentence_transformer(tmp_path, mode, include_prompt=False)
    model.tokenizer.padding_side = padding_side
    expected = model.encode(tiny_models.texts(), prompt="query: ", convert_to_tensor=True)
    swapped(model, quantize=None)
    torch.testing.assert_close(model.encode(tiny_models.texts(), prompt="query: ", convert_to_tensor=True), expected)


def test_pooling_of_packed_and_special_features(tmp_path: Path) -> None:
    features = {
        "packed": {"token_embeddings": torch.randn(1, 9, 64), "cu_seq_lens_q": torch.tensor([0, 4, 9])},
        "no mask": {"token_embeddings": torch.randn(2, 5, 64)},
        "shorter mask": {"token_embeddings": torch.randn(2, 5, 64), "attention_mask": torch.ones(2, 4)},
        "word weights": {
            "token_embeddings": torch.randn(2, 5, 64),
            "attention_mask": torch.ones(2, 5, dtype=torch.int64),
            "token_weights_sum": torch.tensor([2.0, 3.0]),
        },
        "prompt as a tensor": {"token_embeddings": torch.randn(2, 5, 64), "prompt_length": torch.tensor([2, 2])},
    }
    model = tiny_models.sentence_transformer(tmp_path, include_prompt=False)
    expected = {name: model[2](model[1](dict(feature)))["sentence_embedding"] for name, feature in features.items()}
    swapped(model, quantize=None)
    for name, feature in features.items():
        actual = model[2](model[1](dict(feature)))
        torch.testing.assert_close(actual["sentence_embedding"], expected[name])
        assert actual["token_embeddings"] is feature["token_embeddings"]


def test_encode_keeps_its_options(model: SentenceTransformer) -> None:
    texts = tiny_models.texts(40)
    options: list[dict[str, Any]] = [
        {},
        {"normalize_embeddings": True, "truncate_dim": 32},
        {"prompt": "query: ", "batch_size": 7},
        {"precision": "ubinary"},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
    ]
    expected = [model.encode(texts, **option) for option in options]
    tokens = model.encode(texts, output_value="token_embeddings")
    everything = model.encode(texts[:3], output_value=None)
    one = model.encode(texts[0])
    swapped(model)
    for option, reference in zip(options, expected, strict=True):
        actual = model.encode(texts, **option)
        assert type(actual) is type(reference)
        assert len(actual) == len(reference)
        assert actual[0].shape == reference[0].shape
        assert actual[0].dtype == reference[0].dtype
        if option.get("precision") != "ubinary":
            stacked = [torch.stack([torch.as_tensor(row) for row in rows]) for rows in (actual, reference)]
            assert torch.cosine_similarity(*stacked).min() > 0.999
    assert [item.shape for item in model.encode(texts, output_value="token_embeddings")] == [t.shape for t in tokens]
    assert [list(item) for item in model.encode(texts[:3], output_value=None)] == [list(item) for item in everything]
    assert model.encode(texts[0]).shape == one.shape


def test_embeddings_do_not_depend_on_the_batch(model: SentenceTransformer) -> None:
    texts = tiny_models.texts(12) * 12  # 144 sequences of up to 60 tokens: several slices
    swapped(model)
    together = model.encode(texts, batch_size=144, convert_to_tensor=True)
    apart = model.encode(texts, batch_size=5, convert_to_tensor=True)
    torch.testing.assert_close(together, apart, rtol=0, atol=2e-3)


def test_slices_give_what_the_whole_batch_gives() -> None:
    encoder = tiny_models.encoder()
    inputs = tiny_models.batch(rows=100, length=40)
    swapped(encoder)
    with torch.no_grad():
        whole = type(encoder).forward(encoder, **inputs, output_hidden_states=True)
        sliced = encoder(**inputs, output_hidden_states=True)
        as_tuple = encoder(**inputs, return_dict=False)
    assert type(sliced) is type(whole)
    assert list(sliced) == list(whole)
    assert len(sliced.hidden_states) == 3
    for one, other in zip([*sliced.hidden_states, *as_tuple], [*whole.hidden_states, *whole[:2]], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.02)
    positional = encoder(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    torch.testing.assert_close(positional, whole.last_hidden_state, rtol=0, atol=0.02)


@torch.no_grad()
def test_a_decoder_keeps_the_cache_of_the_whole_batch_and_is_sliced_without_one() -> None:
    decoder = transformers.LlamaModel(transformers.LlamaConfig(**tiny_models.DECODER)).eval()
    inputs = tiny_models.batch(rows=60, length=40)
    swapped(decoder)
    ran: list[int] = []
    decoder.layers[0].register_forward_hook(lambda _module, args, _output: ran.append(len(args[0])))
    outputs = decoder(**inputs)
    assert ran == [60]
    assert all(layer.keys.shape[0] == 60 for layer in outputs.cache.layers)
    ran.clear()
    sliced = decoder(**inputs, use_cache=False)
    assert len(ran) > 1
    assert sliced.cache is None
    torch.testing.assert_close(sliced.last_hidden_state, outputs.last_hidden_state, rtol=0, atol=0.02)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), "torch.save"])
def test_a_copy_works_and_is_restored_on_its_own(model: SentenceTransformer, copier: Any) -> None:
    texts = tiny_models.texts()
    original = model.encode(texts)
    swapped(model)
    expected = model.encode(texts)
    if copier == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copier(model)
    assert (twin.encode(texts) == expected).all()
    fastembed.unswap(twin)
    assert (twin.encode(texts) == original).all()
    assert (model.encode(texts) == expected).all()


def test_state_dict_holds_the_quantised_tensors(model: SentenceTransformer) -> None:
    swapped(model)
    state = model.state_dict()
    name = "0.model.encoder.layer.0.output.dense"
    assert state[f"{name}.codes"].dtype == torch.uint8
    assert f"{name}.weight" not in state
    other = copy.deepcopy(model)
    for tensor in other.state_dict().values():
        tensor.zero_()
    assert other.load_state_dict(state).missing_keys == []
    assert (other.encode(tiny_models.texts()) == model.encode(tiny_models.texts())).all()


def test_saving_writes_the_original_model(model: SentenceTransformer, tmp_path: Path) -> None:
    texts = tiny_models.texts()
    original = model.encode(texts)
    swapped(model)
    expected = model.encode(texts)
    model.save_pretrained(str(tmp_path / "a"))
    model.save(str(tmp_path / "b"))
    model[0].save(str(tmp_path / "c"))
    assert (model.encode(texts) == expected).all()
    for name in ("a", "b"):
        loaded = SentenceTransformer(str(tmp_path / name), device="cpu")
        assert (loaded.encode(texts) == original).all()
    assert (tmp_path / "a" / "1_Pooling" / "config.json").exists()
    loaded_encoder = type(model[0].model).from_pretrained(tmp_path / "c")
    fastembed.unswap(model)
    for name, tensor in model[0].model.state_dict().items():
        assert torch.equal(loaded_encoder.state_dict()[name], tensor)


def test_without_originals_saving_and_unswap_are_refused(model: SentenceTransformer, tmp_path: Path) -> None:
    report = swapped(model, keep_originals=False)
    assert report.bytes_kept == 0
    assert not any(
        "original" in type(value).__name__.lower() and value.module
        for m in model.modules()
        for value in vars(m).values()
    )
    expected = model.encode(tiny_models.texts())
    with pytest.raises(ValueError, match="keep_originals=True to unswap it"):
        fastembed.unswap(model)
    with pytest.raises(ValueError, match="keep_originals=True to save it"):
        model.save_pretrained(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="keep_originals=True to save it"):
        model[0].model.save_pretrained(str(tmp_path / "saved"))
    assert (model.encode(tiny_models.texts()) == expected).all()


def test_training_a_head_on_a_swapped_encoder() -> None:
    encoder = tiny_models.encoder()
    swapped(encoder)
    encoder.train()
    assert all(module.training for module in encoder.modules())
    loss = encoder(**tiny_models.batch()).last_hidden_state.square().mean()
    loss.backward()
    gradient = encoder.embeddings.word_embeddings.weight.grad
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
    encoder.eval()
    fastembed.unswap(encoder)
    assert not any(module.training for module in encoder.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_change_of_dtype_reaches_the_originals(model: SentenceTransformer, dtype: torch.dtype) -> None:
    original = {name: id(p) for name, p in model.named_parameters()}
    expected = model.encode(tiny_models.texts(), convert_to_tensor=True)
    swapped(model)
    model.to(dtype)
    low = model.encode(tiny_models.texts(), convert_to_tensor=True)
    assert low.dtype == dtype
    assert torch.cosine_similarity(low.float(), expected).min() > 0.99
    fastembed.unswap(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {name: id(p) for name, p in model.named_parameters()} == original
    assert model.encode(tiny_models.texts(), convert_to_tensor=True).dtype == dtype


def test_a_dtype_tried_and_taken_back_costs_the_originals_nothing(model: SentenceTransformer) -> None:
    linear = model[0].model.encoder.layer[0].output.dense
    before = linear.weight.clone()
    swapped(model)
    model.to(torch.bfloat16).to(torch.float32)
    fastembed.unswap(model)
    assert model[0].model.encoder.layer[0].output.dense is linear
    assert torch.equal(linear.weight, before)


def test_tied_layers_are_quantised_once_and_stay_tied() -> None:
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    second.weight, second.bias = first.weight, first.bias
    model = nn.ModuleDict({"first": first, "second": second, "again": first})
    report = swapped(model)
    assert [(row.name, row.kind) for row in report.rows] == [("first", "linear"), ("second", "linear (tied)")]
    assert report.rows[1].bytes_after == 0
    for step in (lambda m: m, copy.deepcopy, lambda m: m.to(torch.bfloat16)):
        model = step(model)
        assert model["first"] is model["again"]
        assert model["first"] is not model["second"]
        assert model["first"].codes is model["second"].codes
        assert model["first"].bias is model["second"].bias
    fastembed.unswap(model)
    assert model["first"] is model["again"]
    assert model["first"].weight is model["second"].weight


def test_what_must_stay_stays_and_the_report_says_why() -> None:
    class Custom(nn.Linear):
        pass

    embedding = nn.Embedding(64, 32)
    head = nn.Linear(32, 64, bias=False)
    head.weight = embedding.weight
    hooked = nn.Linear(32, 32)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(32, 32),
            "embedding": embedding,
            "head": head,
            "custom": Custom(32, 32),
            "float64": nn.Linear(32, 32).double(),
            "hooked": hooked,
            "torch": nn.TransformerEncoderLayer(32, 4, 64, batch_first=True),
            "left_out": nn.ModuleDict({"inside": nn.Linear(32, 32)}),
            "conv1d": transformers.pytorch_utils.Conv1D(64, 32),
            "latent": LatentAttentionPooling(32, 4, 2, ffn=None),
        }
    )
    x = torch.randn(2, 5, 32)
    model.eval()
    expected = model["torch"](x)
    report = swapped(model, QuantConfig(skip=["left_out"]))
    assert [row.name for row in report.rows] == ["plain"]
    assert report.left == {
        "head": "its weight is tied to the model's Embedding",
        "custom": "a Custom, not a plain nn.Linear",
        "float64": "its weight is torch.float64",
        "hooked": "it has hooks",
        "torch.self_attn.out_proj": "a NonDynamicallyQuantizableLinear, not a plain nn.Linear",
        "torch.linear1": "TransformerEncoderLayer reads its weights itself",
        "torch.linear2": "TransformerEncoderLayer reads its weights itself",
        "left_out.inside": "skip",
        **{f"latent.layers.0.to_{part}": "Layer reads its weights itself" for part in "qkv"},
        "latent.layers.0.to_out": "Layer reads its weights itself",
        "conv1d": "weights of a Conv1D, not of an nn.Linear",
    }
    assert torch.equal(model["torch"](x), expected)


def test_a_shared_encoder_is_restored_through_either_model(tmp_path: Path) -> None:
    one = tiny_models.sentence_transformer(tmp_path)
    pooling = tiny_models.sentence_transformer(tmp_path, "cls")[1]
    other = SentenceTransformer(modules=[one[0], pooling], device="cpu")
    expected = other.encode(tiny_models.texts())
    swapped(one)
    assert (other.encode(tiny_models.texts()) != expected).any()
    with pytest.raises(ValueError, match="swapped or quantised already"):
        swapped(other)
    fastembed.unswap(other)
    assert (other.encode(tiny_models.texts()) == expected).all()
    fastembed.unswap(one)  # its pooling


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_bad_weights_are_refused_and_the_model_is_left_alone(
    model: SentenceTransformer, value: float, parameter: str
) -> None:
    name = "0.model.encoder.layer.1.output.dense"
    with torch.no_grad():
        getattr(model.get_submodule(name), parameter).view(-1)[3] = value
    modules = snapshot(model)
    with pytest.raises(ValueError, match=rf"{name} cannot be quantised: {parameter} must be finite.*left as it was"):
        swapped(model)
    assert snapshot(model) == modules
    with pytest.raises(ValueError, match="not swapped"):
        fastembed.unswap(model)
    swapped(model, QuantConfig(skip=(name,)))


def test_misuse_is_named(model: SentenceTransformer) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        fastembed.swap("all-MiniLM-L6-v2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="quantize must be a QuantConfig or None, got int"):
        fastembed.swap(model, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'no\.such' fits none"):
        swapped(model, QuantConfig(skip=("no.such",)))
    with pytest.raises(ValueError, match="nothing to swap"):
        swapped(nn.Sequential(nn.LayerNorm(3)))
    with pytest.raises(ValueError, match="nothing to swap"):
        swapped(model, quantize=None, pooling=False)
    with pytest.raises(ValueError, match=r"may be swapped:\n  1: its weight is torch\.float64"):
        swapped(nn.Sequential(nn.ReLU(), nn.Linear(2, 2).double()))
    with pytest.raises(ValueError, match="model is not swapped"):
        fastembed.unswap(model)
    swapped(model)
    with pytest.raises(ValueError, match="swapped or quantised already"):
        swapped(model)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"bits": 9}, ValueError, "bits must be"),
        ({"bits": "8"}, ValueError, "bits must be"),
        ({"group_size": 0}, ValueError, "group_size must be"),
        ({"activations": "fp8"}, ValueError, "activations must be"),
        ({"skip": "pooler"}, TypeError, "skip must be a list of strings, got 'pooler'"),
        ({"skip": (3,)}, TypeError, "skip must be a list of strings"),
    ],
)
def test_config_is_checked(settings: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        QuantConfig(**settings)


def test_config_is_a_value() -> None:
    assert QuantConfig(skip=["a"]) == QuantConfig(skip=("a",))
    assert hash(QuantConfig()) == hash(QuantConfig())
    with pytest.raises(AttributeError):
        QuantConfig().bits = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("pooler", "0.model.pooler.dense", True),
        ("pool", "0.model.pooler.dense", False),
        ("layer.1", "model.layer.1.dense", True),
        ("layer.1", "model.layer.11.dense", False),
        ("layer.*.attention", "layer.3.attention.self.query", True),
        ("dense", "dense", True),
        ("output.dense", "layer.0.attention.output.dense", True),
    ],
)
def test_skip_patterns(pattern: str, name: str, fits: bool) -> None:
    assert QuantConfig(skip=(pattern,)).skips(name) is fits
