"""save_quantized and load_quantized: the same model comes back, and a damaged folder does not."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from torch import nn

import fastembed
from fastembed import checkpoint
from fastembed.nn import QuantLinear


def quantized(model: nn.Module, **settings: Any) -> nn.Module:
    fastembed.quantize(model, verbose=False, **settings)
    return model


@pytest.mark.parametrize(
    "settings", [{"bits": 4}, {"bits": 3, "quantizer": "hqq"}, {"bits": {"attention": 1, "dense": 8}}]
)
def test_sentence_transformers_come_back(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = tiny_models.sentence_transformer(tmp_path)
    report = fastembed.quantize(model, **settings, verbose=False)
    fastembed.save_quantized(model, tmp_path / "quantised")
    tensors = load_file(tmp_path / "quantised" / "quantized.safetensors")
    assert report.bytes_on_disk == sum(tensor.nbytes for tensor in tensors.values())
    assert not list((tmp_path / "quantised").rglob("*.bin"))
    assert [file.name for file in (tmp_path / "quantised").rglob("*.safetensors")] == ["quantized.safetensors"]
    loaded = fastembed.load_quantized(tmp_path / "quantised")
    assert isinstance(loaded, SentenceTransformer)
    assert str(loaded[0].model) == str(model[0].model)
    texts = tiny_models.texts()
    assert torch.equal(loaded.encode(texts, convert_to_tensor=True), model.encode(texts, convert_to_tensor=True))
    with pytest.raises(ValueError, match="save_quantized"):
        loaded.save_pretrained(str(tmp_path / "other"))
    fastembed.save_quantized(loaded, tmp_path / "again")


def test_cross_encoders_are_calibrated_with_pairs_and_come_back(tmp_path: Path) -> None:
    tiny_models.sentence_transformer(tmp_path).save(str(tmp_path / "encoder"))
    model = CrossEncoder(str(tmp_path / "encoder"), num_labels=1, device="cpu")
    pairs = list(pairwise(tiny_models.texts()))
    quantized(model, avg_bits=5, calibration=pairs)
    fastembed.save_quantized(model, tmp_path / "quantised")
    loaded = fastembed.load_quantized(tmp_path / "quantised")
    assert type(loaded) is CrossEncoder
    assert (loaded.predict(pairs) == model.predict(pairs)).all()


@pytest.mark.parametrize("architecture", tiny_models.CONFIGS)
def test_transformers_models_come_back(tmp_path: Path, architecture: str) -> None:
    model = quantized(tiny_models.encoder(architecture), bits=5)
    fastembed.save_quantized(model, tmp_path)
    loaded = fastembed.load_quantized(tmp_path)
    assert type(loaded) is type(model)
    with torch.no_grad():
        outputs = [m(**tiny_models.batch()).last_hidden_state for m in (model, loaded)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("keep_originals", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_swapped_pooling_comes_back(tmp_path: Path, keep_originals: bool, normalize: bool) -> None:
    model = tiny_models.sentence_transformer(tmp_path, normalize=normalize)
    modules = len(model)
    fastembed.swap(model, fastembed.QuantConfig(bits=8), keep_originals=keep_originals, verbose=False)
    before = str(model)
    fastembed.save_quantized(model, tmp_path / "quantised")
    assert str(model) == before
    written = json.loads((tmp_path / "quantised" / "modules.json").read_text())
    assert len(written) == modules
    assert not any("fastembed" in entry["type"] for entry in written)
    loaded = fastembed.load_quantized(tmp_path / "quantised")
    assert [type(module) for module in loaded] == [type(module) for module in model]
    texts = tiny_models.texts()
    assert torch.equal(loaded.encode(texts, convert_to_tensor=True), model.encode(texts, convert_to_tensor=True))


def test_dense_modules_come_back(tmp_path: Path) -> None:
    model = tiny_models.sentence_transformer(tmp_path, normalize=False)
    model.append(Dense(64, 32))
    model = quantized(model, bits=8)
    assert isinstance(model[2].linear, QuantLinear)
    fastembed.save_quantized(model, tmp_path / "quantised")
    assert [file.name for file in (tmp_path / "quantised").rglob("*.safetensors")] == ["quantized.safetensors"]
    loaded = fastembed.load_quantized(tmp_path / "quantised")
    texts = tiny_models.texts()
    assert torch.equal(loaded.encode(texts, convert_to_tensor=True), model.encode(texts, convert_to_tensor=True))
    # Left alone, its weights are in either file.
    other = tiny_models.sentence_transformer(tmp_path, normalize=False)
    other.append(Dense(64, 32))
    fastembed.save_quantized(quantized(other, bits=8, skip=["2"]), tmp_path / "other")
    loaded = fastembed.load_quantized(tmp_path / "other")
    assert torch.equal(loaded.encode(texts, convert_to_tensor=True), other.encode(texts, convert_to_tensor=True))


def test_loading_beside_other_threads(tmp_path: Path) -> None:
    """Another thread's from_pretrained gets its weights while models are built without."""
    model = quantized(tiny_models.sentence_transformer(tmp_path), bits=8)
    fastembed.save_quantized(model, tmp_path / "quantised")
    base = transformers.BertModel.from_pretrained(tmp_path / "encoder")
    with ThreadPoolExecutor(3) as pool:
        loading = [pool.submit(fastembed.load_quantized, tmp_path / "quantised") for _ in range(2)]
        other = pool.submit(transformers.BertModel.from_pretrained, tmp_path / "encoder").result()
        loaded = [future.result() for future in loading]
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), base.parameters(), strict=True))
    texts = tiny_models.texts()
    for quantised in loaded:
        assert torch.equal(quantised.encode(texts, convert_to_tensor=True), model.encode(texts, convert_to_tensor=True))


def test_t5_is_quantised_whole(tmp_path: Path) -> None:
    """Its feed-forward asks whether `wo.weight` is a tensor, and of what dtype."""
    config = transformers.T5Config(vocab_size=100, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    model = transformers.T5EncoderModel(config).eval()
    report = fastembed.quantize(model, bits=8, verbose=False)
    assert not report.left
    fastembed.save_quantized(model, tmp_path)
    batch = tiny_models.batch()
    with torch.no_grad():
        outputs = [m(**batch).last_hidden_state for m in (model, fastembed.load_quantized(tmp_path))]
    assert torch.equal(*outputs)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    second.weight, second.bias = first.weight, first.bias
    return nn.Sequential(first, nn.GELU(), second, nn.LayerNorm(64), nn.Linear(64, 3)).eval()


def test_plain_modules_come_back_and_what_is_tied_stays_tied(tmp_path: Path) -> None:
    model = quantized(plain(), bits=4)
    fastembed.save_quantized(model, tmp_path)
    into = nn.Sequential(*copy.deepcopy(plain()))
    loaded = fastembed.load_quantized(tmp_path, into)
    x = torch.randn(5, 64)
    assert torch.equal(loaded(x), model(x))
    assert loaded[0].codes is loaded[2].codes
    with pytest.raises(ValueError, match="model must be given to load a Sequential into"):
        fastembed.load_quantized(tmp_path)


def damage_tensors(folder: Path, change: Any) -> None:
    file = folder / "quantized.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, {"fastembed": "{}"})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("4.codes"), r"the file must hold 4\.codes, and it is missing"),
        (
            lambda t: t.update({"4.scales": t["4.scales"][:, :0]}),
            r"4\.scales must have shape \[1, 1, 64\], got \[1, 0, 64\]",
        ),
        (
            lambda t: t.update({"4.scales": t["4.scales"].float()}),
            r"4\.scales must be torch\.float16, got torch\.float32",
        ),
        (lambda t: t.update({"9.codes": t["4.codes"].clone()}), r"tensors of the model only, got 9\.codes"),
    ],
)
def test_damaged_tensors_are_named_and_the_model_is_left_alone(tmp_path: Path, change: Any, match: str) -> None:
    fastembed.save_quantized(quantized(plain(), bits=4), tmp_path)
    damage_tensors(tmp_path, change)
    into = plain()
    modules = [id(module) for module in into.modules()]
    with pytest.raises(ValueError, match=match):
        fastembed.load_quantized(tmp_path, into)
    assert [id(module) for module in into.modules()] == modules


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    fastembed.save_quantized(quantized(plain(), bits=4), tmp_path)
    settings, tensors = tmp_path / "fastembed.json", tmp_path / "quantized.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="must be an undamaged fastembed safetensors file"):
        fastembed.load_quantized(tmp_path, plain())
    tensors.write_bytes(whole)
    newer = json.loads(settings.read_text()) | {"version": 2}
    settings.write_text(json.dumps(newer))
    with pytest.raises(ValueError, match="path must have format version 1 or older, got 2"):
        fastembed.load_quantized(tmp_path, plain())
    for damaged in (b"{}", b"[1]", b"\xff\xfe", json.dumps(newer | {"version": "1"}).encode()):
        settings.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"must be a folder that fastembed\.save_quantized wrote"):
            fastembed.load_quantized(tmp_path, plain())
    settings.unlink()
    with pytest.raises(FileNotFoundError):
        fastembed.load_quantized(tmp_path, plain())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"layers": None}, r"fastembed\.json is damaged at 'layers'"),
        ({"layers": {"0": 4}}, r"fastembed\.json is damaged at 'layers'"),
        ({"tied": {"0.codes": 3}}, r"fastembed\.json is damaged at 'tied'"),
        ({"bits": 12}, r"0 must have the settings of a QuantLinear in fastembed\.json"),
        ({"colour": 1}, r"0 must have the settings of a QuantLinear in fastembed\.json"),
        ({"scale_dtype": "int3"}, r"0 must have the settings of a QuantLinear in fastembed\.json"),
    ],
)
def test_damaged_settings_are_named(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    fastembed.save_quantized(quantized(plain(), bits=4), tmp_path)
    file = tmp_path / "fastembed.json"
    settings = json.loads(file.read_text())
    (settings if changes.keys() <= settings.keys() else settings["layers"]["0"]).update(changes)
    file.write_text(json.dumps(settings))
    into = plain()
    modules = [id(module) for module in into.modules()]
    with pytest.raises(ValueError, match=match):
        fastembed.load_quantized(tmp_path, into)
    assert [id(module) for module in into.modules()] == modules


def test_models_with_other_layers_are_refused(tmp_path: Path) -> None:
    fastembed.save_quantized(quantized(nn.Sequential(nn.Linear(64, 32)), bits=4), tmp_path)
    with pytest.raises(ValueError, match=r"0 must have 64 in_features and 32 out_features, got \(48, 32\)"):
        fastembed.load_quantized(tmp_path, nn.Sequential(nn.Linear(48, 32)))
    with pytest.raises(ValueError, match=r"0 must be an nn\.Linear in the model, where the file has one, got Conv1d"):
        fastembed.load_quantized(tmp_path, nn.Sequential(nn.Conv1d(64, 32, 1)))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module or None, got str"):
        fastembed.load_quantized(tmp_path, "model")  # type: ignore[arg-type]


def test_a_save_that_fails_leaves_no_folder_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of an older model are not taken for those of newer tensors."""
    fastembed.save_quantized(quantized(plain(), bits=4), tmp_path)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_safetensors", stop)
    with pytest.raises(KeyboardInterrupt):
        fastembed.save_quantized(quantized(plain(), bits=8), tmp_path)
    with pytest.raises(FileNotFoundError):
        fastembed.load_quantized(tmp_path, plain())


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model must have quantised layers"):
        fastembed.save_quantized(plain(), tmp_path)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        fastembed.save_quantized("model", tmp_path)  # type: ignore[arg-type]


def test_compile_export_autocast_and_a_trainable_head() -> None:
    encoder = quantized(tiny_models.encoder(), bits=4)
    batch = tiny_models.batch()
    model = nn.Sequential(plain(), nn.Linear(3, 1))
    quantized(model, bits=4, skip=["1"])
    x = torch.randn(5, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert encoder(**batch).last_hidden_state.isfinite().all()
    model(x).sum().backward()
    assert model[1].weight.grad.abs().sum() > 0
    embeddings = encoder.get_input_embeddings().weight
    encoder(**batch).last_hidden_state.square().sum().backward()
    assert embeddings.grad.abs().sum() > 0


def test_quantised_encoder_compiles() -> None:
    encoder = quantized(tiny_models.encoder(attn_implementation="eager"), bits=4)
    batch = tiny_models.batch()
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).last_hidden_state, encoder(**batch).last_hidden_state)


def test_state_of_another_configuration_of_the_same_shapes_is_refused() -> None:
    state = QuantLinear.from_linear(nn.Linear(62, 60), group_size=64).state_dict()
    for other in (QuantLinear(61, 60), QuantLinear(62, 60, group_size=128), QuantLinear(62, 59)):
        with pytest.raises(RuntimeError, match=r"state_dict"):
            other.load_state_dict(state)
