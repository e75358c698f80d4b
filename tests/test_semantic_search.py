"""The drop-in for sentence-transformers' semantic_search."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastembed.integrations.semantic_search import semantic_search

CORPUS = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
QUERIES = CORPUS[:20] + 0.3 * torch.randn(20, 64, generator=torch.Generator().manual_seed(1))


def dot_score(queries: Any, corpus: Any) -> Any:
    raise AssertionError("known by its name, never called")


@pytest.mark.parametrize("k", [1, 5, 500, 900])
@pytest.mark.parametrize("bits", [1, 2])
def test_results_are_those_of_sentence_transformers(k: int, bits: int) -> None:
    util = pytest.importorskip("sentence_transformers.util")
    expected = util.semantic_search(QUERIES, CORPUS, top_k=k)
    # Enough candidates to be exact.
    for ours in (
        semantic_search(QUERIES, CORPUS, 7, 100, k, util.cos_sim, bits=bits, rescore_multiplier=500),
        semantic_search(list(QUERIES.numpy()), CORPUS.numpy(), top_k=k, bits=bits, rescore_multiplier=500),
    ):
        assert [[hit["corpus_id"] for hit in hits] for hits in ours] == [
            [hit["corpus_id"] for hit in hits] for hits in expected
        ]
        np.testing.assert_allclose(
            [[hit["score"] for hit in hits] for hits in ours],
            [[hit["score"] for hit in hits] for hits in expected],
            atol=1e-6,
        )


def test_few_candidates_find_nearly_all_and_score_exactly() -> None:
    everything = semantic_search(QUERIES, CORPUS, top_k=500, rescore_multiplier=500)
    found = semantic_search(QUERIES, CORPUS, top_k=5)
    for hits, scored in zip(found, everything, strict=True):
        exact = {hit["corpus_id"]: hit["score"] for hit in scored}
        assert all(hit["score"] == exact[hit["corpus_id"]] for hit in hits)
        assert hits[0] == scored[0]


def test_one_query_no_corpus_and_no_queries() -> None:
    one = semantic_search(QUERIES[:1], CORPUS, top_k=3)
    for query in (QUERIES[0], [QUERIES[0]], QUERIES[0].tolist(), QUERIES[0].numpy()):
        assert semantic_search(query, list(CORPUS), top_k=3) == one
    assert semantic_search(QUERIES, CORPUS[:0]) == [[]] * 20
    assert semantic_search(QUERIES, []) == [[]] * 20
    assert semantic_search(QUERIES[:0], CORPUS) == []


def test_a_file_mapped_for_reading_is_a_corpus(tmp_path: Path) -> None:
    np.save(tmp_path / "corpus.npy", CORPUS.numpy())
    mapped = np.load(tmp_path / "corpus.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert semantic_search(QUERIES, mapped, top_k=np.uint8(99)) == semantic_search(QUERIES, CORPUS, top_k=99)


def test_dot_products_of_unit_vectors_are_cosines() -> None:
    unit, corpus = torch.nn.functional.normalize(QUERIES), torch.nn.functional.normalize(CORPUS)
    assert semantic_search(unit, corpus, score_function=dot_score) == semantic_search(unit, corpus)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query_embeddings": QUERIES[:, 1:]}, ValueError, "query_embeddings must have the 64 dims of the corpus, got 63"),
    ({"query_embeddings": QUERIES * torch.nan}, ValueError, "query_embeddings must be finite"),
    ({"corpus_embeddings": CORPUS / 0}, ValueError, "corpus_embeddings must be finite"),
    ({"query_embeddings": "text"}, TypeError, "query_embeddings must be a NumPy array or a tensor, got str"),
    ({"corpus_embeddings": CORPUS.to_sparse()}, TypeError, "corpus_embeddings must be dense, got a tensor of layout"),
    ({"score_function": "dot"}, ValueError, "score_function must be util.cos_sim or util.dot_score, got 'dot'"),
    ({"score_function": dot_score}, ValueError, "must be util.cos_sim unless all embeddings have unit length"),
    ({"corpus_embeddings": CORPUS.int()}, TypeError, "corpus_embeddings must be"),
    ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
    ({"bits": 9}, ValueError, "bits must be between 1 and 8"),
    ({"rescore_multiplier": 0}, ValueError, "rescore_multiplier must be at least 1"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_raises_one_clear_error(case: int) -> None:
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        semantic_search(**{"query_embeddings": QUERIES, "corpus_embeddings": CORPUS, **changes})
