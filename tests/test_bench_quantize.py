"""The parts of `python -m bench.quantize` that need no trained model, and all of it on a tiny one."""

import copy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sentence_transformers")

import tiny_models
import torch

import fastembed
from bench import quantize
from bench.quantize import Row, timing
from fastembed.demo.corpus import Pair
from fastembed.quantization import calibration


@pytest.fixture(autouse=True)
def short_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the whole standard library takes seconds."""
    monkeypatch.setattr(calibration, "_texts_of_the_standard_library", lambda: tiny_models.texts(4))


def test_uniform_between_and_beyond_its_widths() -> None:
    rows = [Row("uniform", "", bits, cosine, 0, 0) for bits, cosine in ((2, 0.9), (3, 0.99), (5, 0.9999))]
    assert quantize.uniform_at(rows, 3) == pytest.approx(0.99)
    assert quantize.uniform_at(rows, 4) == pytest.approx(0.999)
    assert quantize.uniform_at(rows, 6) == pytest.approx(0.99999)
    assert quantize.uniform_at(rows, 1) == pytest.approx(0.0)


def test_goals_and_orders_are_judged() -> None:
    rows = [
        Row("uniform", "2 bits", 2, 0.8, 0.5, 5.0),
        Row("uniform", "8 bits", 8, 0.99, 0.6, 0.4),
        Row("measured", "avg_bits=4.25", 4.2, 0.95, 0.6, 0.7),
        Row("measured", "avg_bits=6", 6, 0.90, 0.6, 0.0),
        Row("LIM", "avg_bits=4.25", 4.2, 0.94, 0.6, 0.7),
        Row("LIM reversed", "avg_bits=4.25", 4.2, 0.90, 0.6, 0.7),
        Row("random", "avg_bits=4.25", 4.2, 0.90, 0.6, 0.7),
        Row("random", "avg_bits=4.25", 4.2, 0.96, 0.6, 0.7),
    ]
    # 8 bits lose too much, 4.25 do not; 6 bits are worse than uniform; LIM is better than random on average.
    of_all = [row for row in rows if quantize.has_goal(row.order, row.name)]
    assert [met for _, met in quantize.verdicts(rows, of_all)] == [False, True, True, False, True]


def test_every_order_on_a_tiny_model(tmp_path: Path) -> None:
    model = tiny_models.sentence_transformer(tmp_path)
    texts = tiny_models.texts(8)
    evaluation = quantize.Evaluation(model, [Pair(text, text) for text in texts])
    settings = list(quantize.Planner(model).settings([5.0], 1))
    rows = [evaluation.row(setting) for setting in settings]
    assert {row.order for row in rows} > {"uniform", "measured", "LIM", "LIM reversed", "ZD", "random"}
    assert all(row.bits <= 5.0 for row in rows if row.name == "avg_bits=5")
    assert all(np.isfinite([row.cosine, row.mrr, row.lost]).all() for row in rows)
    eight = next(row for row in rows if row.name == "8 bits")
    assert eight.cosine > 0.99
    assert quantize.verdicts(rows, rows[:0])


def test_mixed_models_are_those_of_quantize(tmp_path: Path) -> None:
    model = tiny_models.sentence_transformer(tmp_path)
    settings = {setting.order: setting for setting in quantize.Planner(model).settings([5.0], 0)}
    mixer = quantize.Mixer(model)
    for order, quantizer in (("measured", "mse"), ("measured, gptq", "gptq")):
        mixed, bits = mixer.mix(settings[order])
        expected = copy.deepcopy(model)
        report = fastembed.quantize(expected, avg_bits=5.0, quantizer=quantizer, verbose=False)
        assert bits == pytest.approx(report.average_bits)
        state = expected.state_dict()
        assert mixed.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in mixed.state_dict().items())


def test_more_pairs_are_judged_together_with_the_first(tmp_path: Path) -> None:
    model = tiny_models.sentence_transformer(tmp_path)
    pairs = [Pair(text, text.upper()) for text in tiny_models.texts(8)]
    layer = next(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    setting = quantize.Setting("uniform", "3 bits", "mse", {layer: 3})
    together = quantize.Evaluation(model, pairs).row(setting)
    apart = quantize.Evaluation(model, pairs[:5], pairs[5:]).row_of_all(setting)
    assert (apart.bits, apart.mrr) == (together.bits, together.mrr)
    assert apart.cosine == pytest.approx(together.cosine, abs=1e-6)


@pytest.mark.parametrize("name", list(timing.GOALS))
def test_timed_quantisers_make_layers(name: str) -> None:
    weight, x = torch.randn(40, 96), torch.randn(64, 96)
    layer = timing.quantize(name, weight, 4, x)
    assert (layer.dequantize() - weight).norm() < 0.2 * weight.norm()
