"""Search over binary and few-bit codes: ours, FAISS, and USearch where it is installed.

The limit "popcount" is that of one xor, population count and add for every word of a pair; adding words up bit by bit
before counting gets beyond it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import faiss
import numpy as np

import fastembed

from . import Case, Context, Faster, Workload, optional_import
from .harness.workload import OURS

usearch = optional_import("usearch")
K = 10
# Bytes; codes that may stay in a cache between calls owe the memory nothing.
LARGEST_CACHE = 1 << 26


def cases() -> Iterator[Case]:
    """Complete searches, selection of the k best included."""
    yield Case("hamming, 1024 bits, 256 queries", _hamming(1024, 256, faster=3.5))
    yield Case("hamming, 1024 bits, 32 queries", _hamming(1024, 32, faster=3.5))
    yield Case("hamming, 1024 bits, 32 queries, k = 1000", _hamming(1024, 32, k=1000))
    yield Case("hamming, 1024 bits, 1 query", _hamming(1024, 1, faster=1.0, faster_in_parallel=1.25))
    yield Case("hamming, 1024 bits, 1 query, 100k codes", _hamming(1024, 1, codes=100_000))
    yield Case("hamming, 512 bits, 256 queries", _hamming(512, 256, faster=2.0))
    yield Case("hamming, 384 bits, 256 queries", _hamming(384, 256))
    yield Case("hamming, 256 bits, 256 queries", _hamming(256, 256, faster=2.0))
    yield Case("hamming, 1024 bits, 32 queries, 20k codes", _hamming(1024, 32, codes=20_000, with_usearch=True))
    yield Case("sdc, 2 bits, 512 dims, 256 queries", _sdc(2, 512, 256))
    yield Case("sdc, 2 bits, 384 dims, 1 query", _sdc(2, 384, 1))
    yield Case("sdc, 4 bits, 256 dims, 256 queries", _sdc(4, 256, 256))


def _hamming(
    bits: int,
    queries: int,
    *,
    codes: int = 1_000_000,
    k: int = K,
    faster: float | None = None,
    faster_in_parallel: float | None = None,
    with_usearch: bool = False,
) -> Callable[[Context], Workload]:
    """`faster`: goal against FAISS, with `faster_in_parallel` in its place on more than one thread."""

    def setup(context: Context) -> Workload:
        count = 4 * k if context.quick else codes
        rng = np.random.default_rng(0)
        c = rng.integers(0, 256, (count, bits // 8), dtype=np.uint8)
        q = rng.integers(0, 256, (queries, bits // 8), dtype=np.uint8)
        index = faiss.IndexBinaryFlat(bits)
        index.add(c)
        providers: dict[str, Callable[[], Any]] = {
            OURS: lambda: fastembed.hamming_topk(q, c, k),
            "FAISS": lambda: index.search(q, k),
        }
        if with_usearch and usearch is not None:
            providers["USearch"] = _usearch_exact(q, c, k, context.threads)
        distances = np.stack([np.sort(np.bitwise_count(row ^ c).sum(axis=1, dtype=np.int32))[:k] for row in q[:4]])
        goal = faster if context.threads == 1 or faster_in_parallel is None else faster_in_parallel
        pairs = queries * count
        demands: dict[str, float] = {"popcount": pairs * bits}
        if c.nbytes > LARGEST_CACHE:
            demands["read"] = c.nbytes
        return Workload(
            providers=providers,
            verify=lambda _, result: float(np.abs(result[0][:4].astype(np.int64) - distances).max()),
            tolerance=0,
            amount=pairs,
            unit="pair",
            demands=demands,
            goals=[] if goal is None else [Faster("FAISS", goal)],
        )

    return setup


def _usearch_exact(q: np.ndarray, c: np.ndarray, k: int, threads: int) -> Callable[[], Any]:
    from usearch.index import MetricKind, search

    def call() -> tuple[np.ndarray, np.ndarray]:
        matches = search(c, q, k, metric=MetricKind.Hamming, exact=True, threads=threads)
        return matches.distances.astype(np.int64), matches.keys

    return call


def _sdc(bits: int, dim: int, queries: int) -> Callable[[Context], Workload]:
    """Beside FAISS's scalar quantiser of 4 bits, which takes float queries, and an exact search of the float vectors.

    The error is 1 - Recall@10 against the float vectors, queries being noisy copies of documents.
    """

    def setup(context: Context) -> Workload:
        count = 400 if context.quick else 200_000
        rng = np.random.default_rng(0)
        x = rng.standard_normal((count, dim), dtype=np.float32)
        q = x[:queries] + rng.standard_normal((queries, dim), dtype=np.float32)
        x, q = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (x, q))
        codes = fastembed.sdc_encode(x, bits)
        exact = faiss.IndexFlatIP(dim)
        exact.add(x)
        quantised = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_4bit, faiss.METRIC_INNER_PRODUCT)
        quantised.train(x[:10_000])
        quantised.add(x)
        _, truth = exact.search(q, K)

        def missed(_: str, result: tuple[np.ndarray, np.ndarray]) -> float:
            found = sum(len(np.intersect1d(*rows)) for rows in zip(result[1], truth, strict=True))
            return 1 - found / truth.size

        pairs = queries * count
        # Two bits: three bit streams are counted. More: one multiplication and addition for each dimension.
        demands = {"popcount": 3.0 * pairs * dim} if bits == 2 else {"int8": 2.0 * pairs * dim}
        return Workload(
            providers={
                OURS: lambda: fastembed.sdc_topk(q, codes, K),
                "FAISS SQ4": lambda: quantised.search(q, K),
                "FAISS float32": lambda: exact.search(q, K),
            },
            verify=missed,
            tolerance=1,
            amount=pairs,
            unit="pair",
            demands=demands,
            goals=[Faster("FAISS SQ4", 3.0)],
        )

    return setup
