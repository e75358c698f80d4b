"""The ways to search the encoded corpus, and how good their answers are."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..ops.search import hamming_topk, pack_bits, rescore, sdc_encode, sdc_topk

K = 10
# Candidates that a search over codes hands to the float vectors.
CANDIDATES = 100
_ROUNDS = 5


@dataclass(frozen=True)
class Quality:
    """Of the answers to queries whose one right answer is the document of the same number, in [0, 1].

    Attributes:
        mrr: mean over queries of 1 / rank of the right answer among the first 10, 0 where it is not among them.
        recall_1, recall_10: share of queries with the right answer first, among the first 10.
    """

    mrr: float
    recall_1: float
    recall_10: float


@dataclass(frozen=True)
class Searched:
    """One way to search: its quality, its speed, and the bytes it keeps per vector."""

    quality: Quality
    queries_per_second: float
    bytes_per_vector: int


def quality(ids: np.ndarray) -> Quality:
    """Judge the answers [Q, k], best first, to queries 0..Q-1."""
    hits = ids[:, :K] == np.arange(len(ids))[:, None]
    ranks = np.arange(1, hits.shape[1] + 1)
    return Quality(float((hits / ranks).sum(axis=1).mean()), float(hits[:, 0].mean()), float(hits.any(axis=1).mean()))


def float_search(documents: np.ndarray, queries: np.ndarray) -> Searched:
    """Dot products with the float32 vectors, by PyTorch."""
    stored, asked = torch.from_numpy(documents), torch.from_numpy(queries)
    k = min(K, len(documents))
    return _timed(lambda: (asked @ stored.T).topk(k).indices.numpy(), len(queries), documents.shape[1] * 4)


def binary_search(documents: np.ndarray, queries: np.ndarray) -> tuple[Searched, Searched]:
    """1-bit codes and Hamming distance: alone, and with the first candidates re-scored by the float vectors."""
    codes = pack_bits(documents)
    k, candidates = min(K, len(codes)), min(CANDIDATES, len(codes))

    def alone() -> np.ndarray:
        return hamming_topk(pack_bits(queries), codes, k)[1]

    def rescored() -> np.ndarray:
        found = hamming_topk(pack_bits(queries), codes, candidates)[1]
        return rescore(queries, documents, found, k)[1]

    return (
        _timed(alone, len(queries), codes.shape[1]),
        _timed(rescored, len(queries), codes.shape[1] + documents.shape[1] * 4),
    )


def sdc_search(documents: np.ndarray, queries: np.ndarray, bits: int = 2) -> tuple[Searched, Searched]:
    """Few-bit codes and symmetric distance calculation: alone, and with the first candidates re-scored."""
    codes = sdc_encode(documents, bits)
    k, candidates = min(K, len(codes)), min(CANDIDATES, len(codes))

    def alone() -> np.ndarray:
        return sdc_topk(queries, codes, k)[1]

    def rescored() -> np.ndarray:
        return rescore(queries, documents, sdc_topk(queries, codes, candidates)[1], k)[1]

    stored = codes.nbytes // len(codes)
    return (
        _timed(alone, len(queries), stored),
        _timed(rescored, len(queries), stored + documents.shape[1] * 4),
    )


def _timed(search: Callable[[], np.ndarray], queries: int, bytes_per_vector: int) -> Searched:
    """The best of a few rounds, encoding of the queries' codes included."""
    best = float("inf")
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        ids = search()
        best = min(best, time.perf_counter() - start)
    return Searched(quality(ids), queries / best, bytes_per_vector)
