"""The parts of `python -m bench.exits` that need no training."""

import random

import numpy as np
import pytest

pytest.importorskip("sentence_transformers")

from bench import exits
from fastembed.demo.corpus import Pair


def test_an_epoch_holds_every_pair_once_and_lengths_together() -> None:
    pairs = [Pair("q" * length, f"d{length}") for length in range(1, 1 + 3 * exits.BATCH)]
    batches = exits.batches(pairs, random.Random(0))
    assert [len(batch) for batch in batches] == [exits.BATCH] * 3
    assert sorted(len(pair.query) for batch in batches for pair in batch) == list(range(1, 1 + 3 * exits.BATCH))
    assert all(len(batch[-1].query) - len(batch[0].query) == exits.BATCH - 1 for batch in batches)
    assert batches == exits.batches(pairs, random.Random(0))


def test_quality_by_hand() -> None:
    documents = np.eye(3, dtype=np.float32)
    queries = np.array([[1, 0, 0], [0.9, 0.5, 0], [0, 0, 1]], dtype=np.float32)  # the second finds the first one's
    assert exits.quality(queries, documents) == (pytest.approx((1 + 1 / 2 + 1) / 3), pytest.approx(2 / 3))


def test_comparison_by_exit() -> None:
    before, after = {(1, 32): (0.1, 0.0)}, {(1, 32): (0.4, 0.2)}
    assert exits.compare(before, after) == [exits.Row(1, 32, 0.1, 0.4, 0.0, 0.2)]
