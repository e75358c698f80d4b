"""Search over binary and few-bit codes: ours, FAISS, and USearch and turbovec where they are installed.

The limit "popcount" is that of one xor, population count and add for every word of a pair; adding words up bit by bit
before counting gets beyond it. USearch fills a matrix of all distances before it selects: with few codes that stays in
a cache, and USearch comes closer. FAISS shares a search out by queries, so a single query has one thread, whatever
--threads says.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import faiss
import numpy as np

import fastembed

from . import Case, Context, Faster, Goal, OfLimit, Rate, Workload, optional_import
from .harness.workload import OURS

usearch = optional_import("usearch")
turbovec = optional_import("turbovec")
K = 10
# Bytes; codes that may stay in a cache between calls owe the memory nothing.
LARGEST_CACHE = 1 << 26
# Computed anew to compare results with.
_VERIFIED_PAIRS = 4_000_000

Goals = Sequence[Goal]


def cases() -> Iterator[Case]:
    """Complete searches, selection of the k best included."""
    many: list[Goal] = [Rate(0.85e9), OfLimit(0.7), Faster("FAISS", 3.5)]
    yield Case("hamming, 1024 bits, 256 queries", _hamming(1024, 256, goals=many))
    yield Case(
        "hamming, 1024 bits, 32 queries",
        _hamming(1024, 32, with_usearch=True, goals=[*many, Faster("USearch", 15.0)]),
    )
    yield Case(
        "hamming, 1024 bits, 32 queries, k = 1000", _hamming(1024, 32, k=1000, goals=[Faster("k = 10", 1 / 1.3)])
    )
    yield Case(
        "hamming, 1024 bits, 1 query",
        _hamming(1024, 1, goals=[OfLimit(0.9)], goals_in_parallel=[Faster("FAISS", 1.25)]),
    )
    yield Case("hamming, 1024 bits, 1 query, 100k codes", _hamming(1024, 1, codes=100_000, goals=[Rate(0.6e9)]))
    yield Case("hamming, 1024 bits, 32 queries, 20k codes", _hamming(1024, 32, codes=20_000, with_usearch=True))
    yield Case("hamming, 1024 bits, 32 queries, 10M codes", _hamming(1024, 32, codes=10_000_000, goals=many))
    yield Case("hamming, 4096 bits, 32 queries", _hamming(4096, 32))
    yield Case("hamming, 512 bits, 256 queries", _hamming(512, 256, goals=[Faster("FAISS", 2.0)]))
    yield Case("hamming, 384 bits, 256 queries", _hamming(384, 256))
    yield Case("hamming, 256 bits, 256 queries", _hamming(256, 256, goals=[Faster("FAISS", 2.0)]))
    yield Case(
        "hamming, 512 bits, 32 queries, 10M codes", _hamming(512, 32, codes=10_000_000, goals=[Faster("FAISS", 2.0)])
    )
    yield Case(
        "hamming, 256 bits, 32 queries, 10M codes", _hamming(256, 32, codes=10_000_000, goals=[Faster("FAISS", 2.0)])
    )
    yield Case("sdc, 2 bits, 512 dims, 256 queries", _sdc(2, 512, 256, goals=[Rate(0.4e9)]))
    yield Case("sdc, 4 bits, 256 dims, 256 queries", _sdc(4, 256, 256, goals=[Rate(0.75e9)]))
    yield Case("sdc, 4 bits, 256 dims, 32 queries", _sdc(4, 256, 32, goals=[Rate(0.75e9)]))
    yield Case("sdc, 2 bits, 384 dims, 1 query", _sdc(2, 384, 1))


def _hamming(
    bits: int,
    queries: int,
    *,
    codes: int = 1_000_000,
    k: int = K,
    goals: Goals = (),
    goals_in_parallel: Goals | None = None,
    with_usearch: bool = False,
) -> Callable[[Context], Workload]:
    """`goals_in_parallel` stand in place of the others on more than one thread."""

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
        if k != K:
            providers[f"k = {K}"] = lambda: fastembed.hamming_topk(q, c, K)
        if with_usearch and usearch is not None:
            providers["USearch"] = _usearch_exact(q, c, k, context.threads)
        distances = np.stack([_distances_in_order(row, c)[:k] for row in q[: _VERIFIED_PAIRS // count + 1]])
        pairs = queries * count
        demands: dict[str, float] = {"popcount": pairs * bits}
        if c.nbytes > LARGEST_CACHE:
            demands["read"] = c.nbytes

        def wrong(_: str, result: tuple[np.ndarray, np.ndarray]) -> float:
            found = result[0][: len(distances)].astype(np.int64)
            return float(np.abs(found - distances[:, : found.shape[1]]).max())

        return Workload(
            providers=providers,
            verify=wrong,
            tolerance=0,
            amount=pairs,
            unit="pair",
            demands=demands,
            goals=goals if context.threads == 1 or goals_in_parallel is None else goals_in_parallel,
            rounds=3 if count > 1_000_000 else 7,
        )

    return setup


def _distances_in_order(query: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """int32 [len(codes)], ascending."""
    parts = [
        np.bitwise_count(query ^ codes[start : start + 100_000]).sum(axis=1, dtype=np.int32)
        for start in range(0, len(codes), 100_000)
    ]
    return np.sort(np.concatenate(parts))


def _usearch_exact(q: np.ndarray, c: np.ndarray, k: int, threads: int) -> Callable[[], Any]:
    from usearch.index import MetricKind, search

    def call() -> tuple[np.ndarray, np.ndarray]:
        matches = search(c, q, k, metric=MetricKind.Hamming, exact=True, threads=threads)
        return matches.distances.astype(np.int64), matches.keys

    return call


def _sdc(bits: int, dim: int, queries: int, *, goals: Goals = ()) -> Callable[[Context], Workload]:
    """50,000 codes, beside indexes of as many bytes each, which take float queries, and a search of the float vectors.

    The error is 1 - Recall@10 against the float vectors, queries being noisy copies of documents. `goals` come with
    that of being three times as fast as each index of FAISS.
    """

    def setup(context: Context) -> Workload:
        count = 2000 if context.quick else 50_000
        rng = np.random.default_rng(0)
        x = rng.standard_normal((count, dim), dtype=np.float32)
        q = x[:queries] + rng.standard_normal((queries, dim), dtype=np.float32)
        x, q = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (x, q))
        codes = fastembed.sdc_encode(x, bits)
        exact = faiss.IndexFlatIP(dim)
        inner = faiss.METRIC_INNER_PRODUCT
        indexes = {
            "FAISS SQ4": faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_4bit, inner),
            # `bits` bits per dim, as 4-bit codes of sub-vectors.
            "FAISS PQ fast-scan": faiss.IndexPQFastScan(dim, dim * bits // 4, 4, inner),
            "FAISS RaBitQ": faiss.IndexPreTransform(
                faiss.RandomRotationMatrix(dim, dim), faiss.IndexRaBitQ(dim, inner, bits)
            ),
        }
        for index in indexes.values():
            index.train(x[:10_000])
        for index in (exact, *indexes.values()):
            index.add(x)
        _, truth = exact.search(q, K)

        def missed(_: str, result: tuple[np.ndarray, np.ndarray]) -> float:
            found = sum(len(np.intersect1d(*rows)) for rows in zip(result[1], truth, strict=True))
            return 1 - found / truth.size

        providers: dict[str, Callable[[], Any]] = {OURS: lambda: fastembed.sdc_topk(q, codes, K)}
        providers |= {name: partial(index.search, q, K) for name, index in indexes.items()}
        if turbovec is not None:
            turbo = turbovec.TurboQuantIndex(dim, bits)
            turbo.add(x)
            providers["turbovec"] = lambda: turbo.search(q, K)
        providers["FAISS float32"] = lambda: exact.search(q, K)
        pairs = queries * count
        # Two bits: three bit streams are counted. More: one multiplication and addition for each dimension.
        demands = {"popcount": 3.0 * pairs * dim} if bits == 2 else {"int8": 2.0 * pairs * dim}
        return Workload(
            providers=providers,
            verify=missed,
            tolerance=1,
            amount=pairs,
            unit="pair",
            demands=demands,
            goals=[*goals, *(Faster(name, 3.0) for name in indexes)] if goals else (),
        )

    return setup
