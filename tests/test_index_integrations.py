"""Indexes beside FAISS, vector databases, sentence-transformers' semantic_search and MTEB."""

import struct
from typing import Any

import numpy as np
import pytest
import torch

import fastembed
from fastembed import BinaryIndex, IVFBinaryIndex
from fastembed.integrations.faiss import from_faiss, to_faiss
from fastembed.integrations.mteb import MTEBSearchIndex
from fastembed.integrations.semantic_search import semantic_search
from fastembed.integrations.vector_databases import to_pgvector, to_pgvector_binary, to_qdrant, to_vespa

DIM = 52
RNG = np.random.default_rng(0)
VECTORS = RNG.standard_normal((400, DIM)).astype(np.float32)
QUERIES = (VECTORS[:11] + 0.3 * RNG.standard_normal((11, DIM))).astype(np.float32)
CODES, QUERY_CODES = fastembed.pack_bits(VECTORS), fastembed.pack_bits(QUERIES)


def flat() -> BinaryIndex:
    index = BinaryIndex(DIM)
    index.add(VECTORS[:200])
    index.add(VECTORS[200:], RNG.permutation(np.arange(1000, 1200)))
    index.remove([5, 1003])
    return index


def inverted(**settings: Any) -> IVFBinaryIndex:
    index = IVFBinaryIndex(DIM, lists=6, nprobe=2, **settings)
    index.train(VECTORS)
    index.add(VECTORS[:250])
    index.add(VECTORS[250:], range(500, 650))
    index.remove([5, 503])
    return index


# ---- FAISS ----


@pytest.mark.parametrize("make", [flat, inverted])
def test_faiss_and_back(make: Any) -> None:
    pytest.importorskip("faiss")
    index = make()
    theirs = to_faiss(index)
    distances, ids = index.search(QUERIES, 15)
    their_distances, their_ids = theirs.search(QUERY_CODES, 15)
    np.testing.assert_array_equal(their_distances, distances)
    clear = distances < distances[:, -1:]  # ties may differ in order and at the end
    for row, mask in enumerate(clear):
        assert set(their_ids[row][mask]) == set(ids[row][mask])
    again = from_faiss(theirs, DIM)
    assert type(again) is type(index)
    assert again.add(VECTORS[:1]) == index.add(VECTORS[:1])
    for ours, expected in zip(again.search(QUERIES, 15), index.search(QUERIES, 15), strict=True):
        np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(again.codes(), index.codes())


def test_faiss_indexes_of_every_kind_are_read() -> None:
    faiss = pytest.importorskip("faiss")
    plain = faiss.IndexBinaryFlat(56)
    plain.add(CODES)
    for dim in (None, DIM):
        ours = from_faiss(plain, dim)
        assert ours.dim == (dim or 56)
        np.testing.assert_array_equal(ours.codes(), CODES)
    named = faiss.IndexBinaryIDMap(faiss.IndexBinaryFlat(56))
    assert len(from_faiss(named)) == 0
    named.add_with_ids(CODES, np.arange(400)[::-1].copy())
    np.testing.assert_array_equal(from_faiss(named).codes(), CODES[::-1])
    lists = faiss.IndexBinaryIVF(faiss.IndexBinaryFlat(56), 56, 5)
    lists.cp.min_points_per_centroid = 1
    lists.train(CODES)
    lists.add(CODES)
    lists.nprobe = 3
    ours = from_faiss(lists, DIM)
    assert (ours.lists, ours.nprobe, len(ours)) == (5, 3, 400)
    np.testing.assert_array_equal(ours.search(QUERIES, 9)[0], lists.search(QUERY_CODES, 9)[0])
    empty = IVFBinaryIndex(DIM, lists=3)
    empty.train(VECTORS)
    assert to_faiss(empty).ntotal == 0
    assert len(from_faiss(to_faiss(empty), DIM)) == 0


def test_faiss_has_no_index_for_the_rest() -> None:
    faiss = pytest.importorskip("faiss")
    with pytest.raises(ValueError, match="index must have metric 'hamming' for FAISS, got 'sdc'"):
        to_faiss(BinaryIndex(DIM, 2, "sdc"))
    with pytest.raises(ValueError, match="index must be trained and have binary centroids"):
        to_faiss(inverted(centroids="float"))
    with pytest.raises(TypeError, match="index must be a BinaryIndex or an IVFBinaryIndex, got IndexBinaryFlat"):
        to_faiss(faiss.IndexBinaryFlat(8))
    with pytest.raises(TypeError, match="index must be a binary index of FAISS, got IndexFlatL2"):
        from_faiss(faiss.IndexFlatL2(8))
    with pytest.raises(
        TypeError, match="index must be flat, an id map of a flat one, or inverted lists, got IndexBinaryH"
    ):
        from_faiss(faiss.IndexBinaryHash(56, 4))
    named = faiss.IndexBinaryIDMap(faiss.IndexBinaryFlat(56))
    named.add_with_ids(CODES[:2], np.array([3, 3]))
    with pytest.raises(ValueError, match="ids must be distinct, got 3"):
        from_faiss(named)
    quantizer = faiss.IndexBinaryFlat(56)
    with pytest.raises(ValueError, match="index must be trained"):
        from_faiss(faiss.IndexBinaryIVF(quantizer, 56, 4))
    plain = faiss.IndexBinaryFlat(56)
    plain.add(CODES)
    for dim in (48, 57):
        with pytest.raises(ValueError, match=f"dim must be between 49 and 56, got {dim}"):
            from_faiss(plain, dim)
    with pytest.raises(ValueError, match="bits beyond dim 49"):
        from_faiss(plain, 49)


# ---- vector databases ----


def test_bytes_of_vector_databases() -> None:
    signs = VECTORS > 0
    vespa = to_vespa(CODES)
    assert vespa.dtype == np.int8
    np.testing.assert_array_equal(np.unpackbits(vespa.view(np.uint8), axis=1, count=DIM), signs)
    strings = to_pgvector(torch.from_numpy(CODES), DIM)
    assert strings == ["".join("01"[bit] for bit in row.tolist()) for row in signs]
    for binary, string in zip(to_pgvector_binary(CODES, np.int64(DIM)), strings, strict=True):
        (length,) = struct.unpack(">i", binary[:4])
        bits = "".join(f"{byte:08b}" for byte in binary[4:])
        assert (length, bits[:length], bits[length:]) == (DIM, string, "0000")
    qdrant = to_qdrant(CODES, DIM)
    np.testing.assert_array_equal(qdrant, np.where(signs, 1, -1))
    distances, ids = fastembed.hamming_topk(QUERY_CODES, CODES, 5)
    dots = to_qdrant(QUERY_CODES, DIM) @ qdrant.T
    np.testing.assert_array_equal(np.take_along_axis(dots, ids, 1), DIM - 2 * distances)


def test_bad_codes_for_vector_databases() -> None:
    with pytest.raises(TypeError, match="codes must be uint8, got float32"):
        to_vespa(VECTORS)
    with pytest.raises(TypeError, match="codes must be a NumPy array, a tensor"):
        to_vespa([1, 2])
    for convert in (to_pgvector, to_pgvector_binary, to_qdrant):
        with pytest.raises(ValueError, match="codes must be 8 bytes wide for dim 60, got 7"):
            convert(CODES, 60)
        with pytest.raises(TypeError, match="dim must be an integer"):
            convert(CODES, 52.0)


# ---- semantic_search over an index ----


def hits(results: list[list[dict[str, Any]]]) -> list[list[tuple[Any, Any]]]:
    return [[(hit["corpus_id"], hit["score"]) for hit in row] for row in results]


def test_semantic_search_takes_an_index() -> None:
    index = BinaryIndex(DIM, rescore="float32")
    index.add(VECTORS)
    expected = hits(semantic_search(QUERIES, VECTORS, top_k=6, rescore_multiplier=400))
    for queries in (QUERIES, torch.from_numpy(QUERIES).requires_grad_()):
        ours = hits(semantic_search(queries, index, top_k=6, rescore_multiplier=400))
        assert [[hit[0] for hit in row] for row in ours] == [[hit[0] for hit in row] for row in expected]
        np.testing.assert_allclose(ours, expected, atol=1e-6)
    assert hits(semantic_search(QUERIES[0], index, top_k=3)) == hits(semantic_search(QUERIES[:1], index, top_k=3))
    assert len(semantic_search(QUERIES, index, top_k=10_000)[0]) == 400
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        semantic_search(QUERIES, index, top_k=0)
    assert semantic_search(QUERIES, BinaryIndex(DIM)) == [[]] * len(QUERIES)


def test_semantic_search_without_vectors_scores_by_codes() -> None:
    flat_index, sdc, lists = BinaryIndex(DIM), BinaryIndex(DIM, 4, "sdc"), inverted()
    for index in (flat_index, sdc):
        index.add(VECTORS)
    signs, query_signs = np.sign(VECTORS), np.sign(QUERIES)
    for row, found in enumerate(hits(semantic_search(QUERIES, flat_index, top_k=5))):
        for number, score in found:
            np.testing.assert_allclose(score, query_signs[row] @ signs[number] / DIM, rtol=1e-6)
    cosines = QUERIES @ VECTORS.T / np.linalg.norm(QUERIES, axis=1)[:, None] / np.linalg.norm(VECTORS, axis=1)
    for row, found in enumerate(hits(semantic_search(QUERIES, sdc, top_k=5))):
        for number, score in found:
            assert abs(score - cosines[row, number]) < 0.06
    few = semantic_search(QUERIES, lists, top_k=390)
    assert all(0 < len(row) < 390 for row in few), "what no probed list holds is no hit"


# ---- MTEB ----

NAMES = [f"doc {row}" for row in range(400)]


@pytest.mark.parametrize("settings", [{}, {"bits": 4, "metric": "sdc"}, {"rescore": "float16"}])
def test_mteb_backend(settings: dict[str, Any]) -> None:
    backend = MTEBSearchIndex(**settings)
    with pytest.raises(ValueError, match="add_documents must come before search"):
        backend.search(QUERIES, 3)
    backend.add_documents(VECTORS[:300], NAMES[:300])
    backend.add_documents(torch.from_numpy(VECTORS[300:]), NAMES[300:])
    scores, rows = backend.search(torch.from_numpy(QUERIES), 10, lambda a, b: a @ b.T)
    assert [row[0] for row in rows] == list(range(11))
    assert all(sorted(row, reverse=True) == row for row in scores)
    assert len(backend.search(QUERIES, 1000)[1][0]) == 400
    top_ranked = {"q0": ["doc 7", "doc 0", "doc 9"], "q1": ["doc 1"], "q2": []}
    names = {0: "q0", 1: "q1", 2: "q2"}
    scores, rows = backend.search(QUERIES[:3], 2, None, top_ranked=top_ranked, query_idx_to_id=names)
    assert [len(row) for row in rows] == [2, 1, 0]
    assert rows[0][0] == 1, "numbered within the documents named"
    with pytest.raises(ValueError, match="query_idx_to_id must be given"):
        backend.search(QUERIES, 2, None, top_ranked=top_ranked)
    with pytest.raises(ValueError, match="idxs must be distinct"):
        backend.add_documents(VECTORS[:1], ["doc 3"])
    with pytest.raises(ValueError, match="idxs must be one for each of the 2 embeddings, got 1"):
        backend.add_documents(VECTORS[:2], ["new"])
    backend.clear()
    backend.add_documents(VECTORS[:2, :8], ["a", "b"])
    assert len(backend.search(QUERIES[:, :8], 5)[1][0]) == 2
