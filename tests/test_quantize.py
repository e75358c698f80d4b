"""fastembed.quantize: budgets, scores, allocation, what is reported, and that a failure leaves the model alone."""

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from torch import nn

import fastembed
from fastembed.integrations import surgery
from fastembed.nn import QuantLinear
from fastembed.quantization import calibration, importance
from fastembed.quantization.allocation import Choice, allocate, two_levels
from fastembed.quantization.layers import block_of


def quantized(model: nn.Module, **settings: Any) -> fastembed.SwapReport:
    return fastembed.quantize(model, verbose=False, **settings)


@pytest.fixture
def model(tmp_path: Path) -> SentenceTransformer:
    return tiny_models.sentence_transformer(tmp_path)


def linears(model: nn.Module) -> dict[str, int]:
    return {name: id(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}


# Allocation


@given(
    layers=st.lists(
        st.lists(st.tuples(st.integers(1, 40), st.floats(0, 10)), min_size=1, max_size=5), min_size=1, max_size=5
    ),
    share=st.floats(0, 1),
)
def test_allocation_is_the_best_there_is(layers: list[list[tuple[int, float]]], share: float) -> None:
    choices = [[Choice(bits, *option) for bits, option in enumerate(options, 1)] for options in layers]
    least = sum(min(choice.nbytes for choice in options) for options in choices)
    most = sum(max(choice.nbytes for choice in options) for options in choices)
    budget = least + int(share * (most - least))
    chosen = allocate(choices, budget)
    assert sum(choice.nbytes for choice in chosen) <= budget
    assert all(choice in options for choice, options in zip(chosen, choices, strict=True))
    best = min(
        sum(choice.error for choice in combination)
        for combination in itertools.product(*choices)
        if sum(choice.nbytes for choice in combination) <= budget
    )
    assert sum(choice.error for choice in chosen) == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_allocation_of_many_layers_is_no_worse_than_its_relaxation_allows() -> None:
    generator = np.random.default_rng(0)
    layers = []
    for size in generator.integers(1000, 100_000, 200):
        errors = generator.uniform(0.1, 10) * 4.0 ** -np.arange(1, 9)
        layers.append([Choice(b, int(size * b), float(e)) for b, e in zip(range(1, 9), errors, strict=True)])
    budget = sum(options[2].nbytes for options in layers)
    chosen = allocate(layers, budget)
    uniform = sum(options[2].error for options in layers)
    assert sum(choice.nbytes for choice in chosen) <= budget
    assert sum(choice.error for choice in chosen) < uniform


def test_allocation_refuses_what_cannot_fit() -> None:
    with pytest.raises(ValueError, match="budget must be at least 7 bytes for these layers, got 6"):
        allocate([[Choice(1, 3, 1.0)], [Choice(1, 4, 1.0)]], 6)


def test_two_levels_pass_over_what_does_not_fit() -> None:
    sizes = [(1, 2), (4, 8), (1, 2)]
    layers = [(Choice(2, low, 0), Choice(4, high, 0)) for low, high in sizes]
    assert [c.bits for c in two_levels(layers, [0.1, 0.9, 0.5], 9)] == [4, 2, 4]
    assert [c.bits for c in two_levels(layers, [0.1, 0.9, 0.5], 10)] == [2, 4, 2]


def test_two_levels_fill_from_the_most_important() -> None:
    layers = [(Choice(2, 2, 0), Choice(4, 4, 0))] * 4
    assert [c.bits for c in two_levels(layers, [0.1, 0.4, 0.2, 0.3], 12)] == [2, 4, 2, 4]
    assert [c.bits for c in two_levels(layers, [0.1, 0.4, 0.2, 0.3], 13)] == [2, 4, 2, 4]
    assert [c.bits for c in two_levels(layers, [1, 1, 1, 1], 10)] == [4, 2, 2, 2]
    with pytest.raises(ValueError, match="budget must be at least 8"):
        two_levels(layers, [1, 1, 1, 1], 7)


# Scores


def test_lim_is_the_negative_cosine_of_a_blocks_input_and_output() -> None:
    encoder = tiny_models.encoder()
    batch = tiny_models.batch()
    with torch.no_grad():
        states = encoder(**batch, output_hidden_states=True).hidden_states
    valid = batch["attention_mask"].bool()
    expected = [
        -torch.cosine_similarity(x[valid], y[valid], dim=-1).mean().item() for x, y in itertools.pairwise(states)
    ]
    data = calibration.prepare(encoder, [batch])
    assert importance.layer_input_modification(data, list(encoder.encoder.layer)) == pytest.approx(expected, rel=1e-4)


def test_lim_of_single_layers() -> None:
    # An orthogonal layer keeps all similarities; one that maps everything to one vector keeps none of them.
    orthogonal, constant = nn.Linear(16, 16, bias=False), nn.Linear(16, 40)
    nn.init.orthogonal_(orthogonal.weight)
    nn.init.zeros_(constant.weight)
    x = torch.randn(64, 16)
    model = nn.Sequential(orthogonal, constant)
    kept, lost = importance.linear_input_modification(calibration.prepare(model, [x]), list(model))
    assert kept == pytest.approx(-1, abs=1e-4)
    assert lost > -0.6


def test_zd_counts_weights_with_a_z_score_above_one() -> None:
    weight = torch.randn(50, 40) + 3
    scores = (weight - weight.mean()) / weight.std(unbiased=False)
    assert importance.z_score_share([weight[:20], weight[20:]]) == pytest.approx((scores > 1).float().mean().item())


def test_measured_errors_predict_what_quantising_does(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance, "_PROBES", 16)
    texts = tiny_models.texts(12)
    expected = model.encode(texts, convert_to_tensor=True)
    for name in ("0.model.encoder.layer.0.intermediate.dense", "0.model.encoder.layer.1.attention.self.value"):
        changed = copy.deepcopy(model)
        (row,) = quantized(
            changed,
            avg_bits=9,
            skip=[other for other in linears(model) if other != name],
            levels=[2],
            quantizer="mse",
            calibration=texts,
            activations="float",
        ).rows
        actual = 1 - torch.cosine_similarity(changed.encode(texts, convert_to_tensor=True), expected).mean().item()
        assert row.score == pytest.approx(actual, rel=0.3)


def test_levels_are_compared_by_the_quantiser_in_use(model: SentenceTransformer) -> None:
    errors = {}
    for quantizer in ("mse", "gptq"):
        report = quantized(
            copy.deepcopy(model), avg_bits=9, levels=[3], quantizer=quantizer, calibration=tiny_models.texts(30)
        )
        errors[quantizer] = sum(row.score for row in report.rows if row.score is not None)
    assert errors["gptq"] < 0.8 * errors["mse"]


def test_errors_of_gptq_are_measured_on_what_it_has_not_seen() -> None:
    """More features than tokens: on the tokens it was fitted to, GPTQ's error all but vanishes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 32), nn.Tanh())
    batches = [torch.randn(12, 256) for _ in range(2)]
    (unseen,) = quantized(copy.deepcopy(model), avg_bits=9, levels=[2], calibration=batches).rows
    (seen,) = quantized(copy.deepcopy(model), avg_bits=9, levels=[2], calibration=batches[:1]).rows
    assert unseen.score is not None
    assert seen.score is not None
    assert seen.score < 0.5 * unseen.score


def test_gptq_is_the_default_where_there_is_calibration(model: SentenceTransformer) -> None:
    texts = tiny_models.texts()
    for settings, quantizer in (({"calibration": texts}, "gptq"), ({}, "mse")):
        by_default, asked = copy.deepcopy(model), copy.deepcopy(model)
        quantized(by_default, bits=3, **settings)
        quantized(asked, bits=3, quantizer=quantizer, calibration=texts)
        states = zip(by_default.state_dict().values(), asked.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in states)


def test_measured_errors_of_many_levels_are_those_of_each() -> None:
    """Many levels share the gradient in the weight; one by one, tokens are multiplied."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 10))
    layers = [[model[0]], [model[2]]]

    def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
        return (weight * 2**bits).round() / 2**bits

    for shape in ((4, 20), (4, 9, 20)):
        data = calibration.prepare(model, [torch.randn(shape) for _ in range(2)])
        together = importance.measured_errors(data, layers, range(1, 9), itertools.repeat(rounded))
        for bits in range(1, 9):
            alone = importance.measured_errors(data, layers, [bits], itertools.repeat(rounded))
            assert [error[bits] for error in alone] == pytest.approx([error[bits] for error in together], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("0.model.encoder.layer.3.attention.self.query", "0.model.encoder.layer.3"),
        ("layers.10.mlp.Wo", "layers.10"),
        ("0.model.pooler.dense", None),
        ("1", None),
        ("encoder.block.2.layer.0.SelfAttention.q", "encoder.block.2"),
    ],
)
def test_blocks(name: str, block: str | None) -> None:
    assert block_of(name) == block


# Whole models


@pytest.mark.parametrize(
    "settings",
    [
        {"importance": "measured"},
        {"importance": "measured", "levels": (2, 3, 4, 8)},
        {"importance": "lim"},
        {"importance": "zd"},
        {"importance": "lim", "granularity": "linear"},
        {"importance": "zd", "granularity": "linear", "levels": (2, 8)},
        {"importance": {"layer.1": 2.0, "layer.1.output": 0.5}},
    ],
)
def test_budget_is_kept_and_used(model: SentenceTransformer, settings: dict[str, Any]) -> None:
    report = quantized(model, avg_bits=6.5, calibration=tiny_models.texts(), **settings)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert [row.name for row in report.rows] == list(layers)
    assert [row.level for row in report.rows] == [layer.bits for layer in layers.values()]
    assert all(row.score is not None for row in report.rows)
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    stored = sum(layer.bits_per_weight * layer.in_features * layer.out_features for layer in layers.values())
    assert report.average_bits == pytest.approx(stored / weights)
    assert 5 < report.average_bits <= 6.5
    if "levels" in settings:
        assert {row.level for row in report.rows} <= set(settings["levels"])
    assert model.encode(tiny_models.texts()).shape == (6, 64)


def test_the_same_call_gives_the_same_bits(model: SentenceTransformer) -> None:
    other = copy.deepcopy(model)
    settings = {"avg_bits": 5, "quantizer": "gptq", "calibration": tiny_models.texts()}
    quantized(model, **settings)
    torch.set_default_dtype(torch.float16)
    try:
        with torch.autocast("cpu", torch.bfloat16):  # neither of them is the quantiser's business
            quantized(other, **settings)
    finally:
        torch.set_default_dtype(torch.float32)
    states = model.state_dict(), other.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_bits_by_pattern(model: SentenceTransformer) -> None:
    report = quantized(model, bits={"attention": 6, "layer.1.attention": 3, "output.dense": 2})
    assert {row.name: row.level for row in report.rows}["0.model.encoder.layer.0.attention.self.query"] == 6
    assert {row.name: row.level for row in report.rows}["0.model.encoder.layer.1.attention.self.query"] == 3
    assert {row.name: row.level for row in report.rows}["0.model.encoder.layer.1.attention.output.dense"] == 2
    assert report.left["0.model.pooler.dense"] == "no pattern of bits"


def test_activations_by_pattern(model: SentenceTransformer) -> None:
    quantized(model, bits=8, activations={"self.*": "float", "key": "int8"})
    modes = {name: module.activations for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert {name for name, mode in modes.items() if mode == "float"} == {
        f"0.model.encoder.layer.{layer}.attention.self.{name}" for layer in range(2) for name in ("query", "value")
    }


@pytest.mark.parametrize("quantizer", ["rtn", "mse", "hqq", "gptq"])
def test_quantizers_on_a_model(model: SentenceTransformer, quantizer: str) -> None:
    before = model.encode(tiny_models.texts(), convert_to_tensor=True)
    report = quantized(model, bits=6, quantizer=quantizer, calibration=tiny_models.texts(30), group_size=32)
    after = model.encode(tiny_models.texts(), convert_to_tensor=True)
    assert torch.cosine_similarity(before, after).min() > 0.99
    assert all(0 < row.error < 0.05 for row in report.rows)
    assert all(row.score is None for row in report.rows)


def test_transformers_model_with_a_tokenizer_and_with_batches(model: SentenceTransformer) -> None:
    for data in (
        {"calibration": tiny_models.texts(), "tokenizer": model.tokenizer},
        {"calibration": [tiny_models.batch()]},
    ):
        encoder = tiny_models.encoder("distilbert")
        assert 4 < quantized(encoder, avg_bits=5, **data).average_bits <= 5


def test_plain_modules_frozen_or_in_training() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(64, 64)).train()
    model[0].requires_grad_(False)
    report = quantized(model, avg_bits=4.5, calibration=[torch.randn(32, 64), (torch.randn(8, 64),)])
    assert report.average_bits <= 4.5
    assert model[2].training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_every_exit_of_an_encoder_is_measured() -> None:
    encoder = fastembed.MultiExitEncoder(tiny_models.encoder(), [(1, 32), (2, 64)])
    report = quantized(encoder, avg_bits=5, calibration=[tiny_models.batch()], quantizer="mse")
    assert all(row.score for row in report.rows if "layer.1." in row.name)


@torch.inference_mode()
def test_gradients_flow_through_a_model_quantised_in_inference_mode() -> None:
    with torch.inference_mode(False):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        x = torch.randn(3, 64, requires_grad=True)
    quantized(model, bits=8)
    with torch.inference_mode(False):
        model(x).sum().backward()
    assert x.grad is not None


def test_tied_layers_are_scored_once_and_stay_tied() -> None:
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    second.weight, second.bias = first.weight, first.bias
    model = nn.Sequential(first, nn.Tanh(), second, nn.Linear(64, 64))
    report = quantized(model, avg_bits=4.5, calibration=[torch.randn(32, 64)], quantizer="gptq")
    assert model[0].codes is model[2].codes
    assert [row.bytes_after for row in report.rows][1] == 0
    assert report.average_bits <= 4.5


def test_report_reads_as_a_table(model: SentenceTransformer, capsys: pytest.CaptureFixture[str]) -> None:
    report = fastembed.quantize(model, avg_bits=5, calibration=tiny_models.texts())
    assert str(report) in capsys.readouterr().out
    assert all(word in str(report) for word in ("bits", "score", "error", "whole model"))


def test_layers_that_are_left_alike_are_reported_together(model: SentenceTransformer) -> None:
    report = quantized(model, bits={"intermediate": 4})
    left = "left as it is: 0.model.encoder.layer.{0-1}.output.dense (2) (no pattern of bits)"
    assert str(report).splitlines().count(left) == 1


def test_swap_takes_a_budget(model: SentenceTransformer) -> None:
    config = fastembed.QuantConfig(avg_bits=4.5)
    report = fastembed.swap(model, quantize=config, calibration=tiny_models.texts(), verbose=False)
    assert report.average_bits <= 4.5
    fastembed.unswap(model)


def test_without_calibration_the_standard_library_is_read(model: SentenceTransformer) -> None:
    assert quantized(model, avg_bits=4.5, importance="lim").average_bits <= 4.5


# Bad input


class _Stop(Exception):
    pass


def test_interrupted_or_failed_the_model_is_as_it_was(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastembed.quantization import quantizers

    model.train()
    state, modules = copy.deepcopy(model.state_dict()), linears(model)
    calls = iter(range(100))

    def interrupt(*args: Any) -> quantizers.Quantized:
        if next(calls) == 5:
            raise _Stop
        return quantizers._mse(*args)

    monkeypatch.setitem(quantizers.QUANTIZERS, "mse", interrupt)
    with pytest.raises(_Stop):
        quantized(model, avg_bits=4.5, quantizer="mse", calibration=tiny_models.texts())
    assert linears(model) == modules
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())


@pytest.mark.parametrize("keep_originals", [False, True])
@pytest.mark.parametrize("replaced", range(0, 14, 3))
def test_an_interrupted_exchange_is_undone(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch, replaced: int, keep_originals: bool
) -> None:
    before = {name: id(module) for name, module in model.named_modules()}
    calls, replace = itertools.count(), surgery.replace_child

    def interrupt(*args: Any, **kwargs: Any) -> None:
        if next(calls) == replaced:
            raise _Stop
        replace(*args, **kwargs)

    monkeypatch.setattr(surgery, "replace_child", interrupt)
    with pytest.raises(_Stop):
        quantized(model, bits=4, keep_originals=keep_originals)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert not surgery.is_changed(model)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"bits": 4, "avg_bits": 4}, ValueError, "bits and avg_bits exclude each other"),
        ({"bits": {"attention": 9}}, ValueError, "bits must be 1 to 8, got 9"),
        ({"bits": {}}, ValueError, "bits must have at least one pattern"),
        ({"bits": {"no.such": 4}}, ValueError, "bits must fit linear layers of the model, but 'no.such' fits none"),
        ({"avg_bits": 1.2}, ValueError, r"avg_bits must be at least 1\.\d+ for these layers"),
        ({"avg_bits": 1.2, "importance": "zd"}, ValueError, r"avg_bits must be at least 1\.\d+ for these layers"),
        ({"avg_bits": -1}, ValueError, "avg_bits must be a positive number"),
        ({"avg_bits": True}, ValueError, "avg_bits must be a positive number"),
        ({"bits": 4, "levels": (3, 4)}, ValueError, r"levels must be left out without avg_bits, got \(3, 4\)"),
        ({"importance": "lim"}, ValueError, "importance must be left out without avg_bits, got 'lim'"),
        ({"avg_bits": 4, "calibration": ["text", 1]}, TypeError, "calibration must hold texts only, .*, got str at 0"),
        ({"avg_bits": 4, "calibration": [1, 2]}, TypeError, "calibration must hold texts only, .*, got int at 0"),
        ({"avg_bits": 4, "importance": "size"}, ValueError, "importance must be 'measured', 'lim' or 'zd'"),
        ({"avg_bits": 4, "granularity": "head"}, ValueError, "granularity must be 'block' or 'linear'"),
        ({"avg_bits": 4, "levels": (0, 4)}, ValueError, "bits must be 1 to 8, got 0"),
        ({"avg_bits": 4, "levels": (2, 3, 4), "importance": "lim"}, ValueError, "levels must be two unless"),
        ({"avg_bits": 4, "levels": 4}, TypeError, "levels must be a list of bit-levels, got 4"),
        ({"avg_bits": 4, "importance": {"0": "x"}}, ValueError, "importance must have finite numbers as scores"),
        ({"bits": True}, ValueError, "bits must be 1 to 8, got True"),
        ({"activations": {"pooler": "int4"}}, ValueError, "activations must be 'int8' or 'float', got 'int4'"),
        (
            {"activations": {"no.such": "float"}},
            ValueError,
            "activations must fit linear layers .* 'no.such' fits none",
        ),
        ({"avg_bits": 4, "calibration": 5}, TypeError, "calibration must be a list of texts or of batches, got int"),
        ({"quantizer": "awq"}, ValueError, "quantizer must be 'rtn', 'mse', 'hqq' or 'gptq', got 'awq'"),
        ({"quantizer": "hqq", "symmetric": True}, ValueError, "symmetric must be False"),
        ({"group_size": 40}, ValueError, "group_size must be a positive multiple of 16, got 40"),
        ({"avg_bits": 4, "calibration": []}, ValueError, "calibration must have at least one text or batch, got none"),
        (
            {"avg_bits": 4, "calibration": "text"},
            TypeError,
            "calibration must be a list of texts or of batches, got str",
        ),
    ],
)
def test_bad_settings(model: SentenceTransformer, settings: dict[str, Any], error: type[Exception], match: str) -> None:
    modules = linears(model)
    with pytest.raises(error, match=match):
        quantized(model, **{"calibration": tiny_models.texts()} | settings)
    assert linears(model) == modules


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(model: SentenceTransformer, value: float) -> None:
    name = "0.model.encoder.layer.1.output.dense"
    with torch.no_grad():
        model.get_submodule(name).weight[3, 4] = value
    with pytest.raises(ValueError, match=rf"{name} cannot be quantised: weight must be finite.*left as it was"):
        quantized(model, avg_bits=4, calibration=tiny_models.texts())


@pytest.mark.parametrize("settings", [{"avg_bits": 4}, {"avg_bits": 4, "importance": "lim"}, {"quantizer": "gptq"}])
def test_calibration_that_yields_nan_is_refused(settings: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    modules = linears(model)
    with pytest.raises(ValueError, match="calibration must give finite outputs, got NaN or infinite ones from batch 1"):
        quantized(model, calibration=[torch.randn(4, 64), torch.full((4, 64), float("nan"))], **settings)
    assert linears(model) == modules


@pytest.mark.parametrize("importance", ["measured", "lim"])
def test_batches_without_rows_are_refused(importance: str) -> None:
    with pytest.raises(ValueError, match="calibration must have rows in every batch, got none in batch 1"):
        quantized(
            nn.Sequential(nn.Linear(64, 64)),
            avg_bits=4,
            importance=importance,
            calibration=[torch.randn(4, 64), torch.zeros(0, 64)],
        )


def test_models_that_overwrite_what_gradients_need_are_not_measured() -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.linear(x)).log1p_()

    with pytest.raises(ValueError, match=r"importance='measured' needs gradients .* inplace operation"):
        quantized(Overwriting(), avg_bits=4, calibration=[torch.ones(2, 64)])
    assert quantized(Overwriting(), avg_bits=4, importance="lim", calibration=[torch.ones(2, 64)]).rows


def test_models_that_cannot_tokenise_need_batches() -> None:
    with pytest.raises(ValueError, match="calibration must be given"):
        quantized(nn.Sequential(nn.Linear(64, 64)), avg_bits=4)
    with pytest.raises(ValueError, match="calibration with texts needs tokenizer"):
        quantized(nn.Sequential(nn.Linear(64, 64)), avg_bits=4, calibration=["text"])
