"""Search over scalar codes: RaBitQ and optimised scalar quantisation, by queries of 4 and 8 bits and symmetric, beside
FAISS's RaBitQ, fast-scan and scalar-quantiser indexes of as many bytes of codes, and turbovec where it is installed.

The error is 1 - Recall@10 against the float vectors, which are normal, queries being noisy copies of documents. FAISS's
RaBitQ takes queries of as many bits as ours and is given the random rotation that it leaves to its user.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import faiss
import numpy as np

import fastembed

from . import Case, Context, Faster, Workload, optional_import
from .harness.workload import OURS

turbovec = optional_import("turbovec")
K = 10
CODES = 50_000


def cases() -> Iterator[Case]:
    """128 bytes of code for each vector, of 1 to 8 bits; and the width of a common model."""
    yield Case("1 bit, 1024 dims, 4-bit queries", _search(1, 1024, 4))
    yield Case("1 bit, 1024 dims, 8-bit queries", _search(1, 1024, 8))
    yield Case("2 bits, 512 dims, 8-bit queries", _search(2, 512, 8))
    yield Case("4 bits, 256 dims, 8-bit queries", _search(4, 256, 8))
    yield Case("8 bits, 128 dims, 8-bit queries", _search(8, 128, 8))
    yield Case("4 bits, 384 dims, 8-bit queries", _search(4, 384, 8))
    yield Case("4 bits, 384 dims, 1 query of 8 bits", _search(4, 384, 8, queries=1))
    for bits in (1, 4):
        yield Case(f"encode, {bits} bits, 384 dims", _encode(bits, 384))


def _vectors(count: int, dim: int, queries: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, dim), dtype=np.float32)
    q = x[:queries] + rng.standard_normal((queries, dim), dtype=np.float32)
    x, q = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (x, q))
    return x, q


def _search(bits: int, dim: int, query_bits: int, queries: int = 256) -> Callable[[Context], Workload]:
    def setup(context: Context) -> Workload:
        x, q = _vectors(2000 if context.quick else CODES, dim, queries)
        exact = faiss.IndexFlatIP(dim)
        exact.add(x)
        _, truth = exact.search(q, K)

        def missed(_: str, result: tuple[np.ndarray, np.ndarray]) -> float:
            found = sum(len(np.intersect1d(*rows)) for rows in zip(result[1], truth, strict=True))
            return 1 - found / truth.size

        rabitq = fastembed.ScalarQuantizer.fit(x, bits)
        osq = fastembed.ScalarQuantizer.fit(x, bits, method="osq")
        searches = {
            OURS: (rabitq.encode_queries(q, query_bits), rabitq.encode(x)),
            "fastembed osq": (osq.encode_queries(q, query_bits), osq.encode(x)),
            "fastembed symmetric": (rabitq.encode(q), rabitq.encode(x)),
            "fastembed 15-bit queries": (rabitq.encode_queries(q, 15), rabitq.encode(x)),
        }
        providers: dict[str, Callable[[], Any]] = {
            name: partial(fastembed.scalar_topk, *pair, K) for name, pair in searches.items()
        }
        indexes = _faiss_indexes(bits, dim, query_bits)
        for index in indexes.values():
            index.train(x[:10_000])
            index.add(x)
        providers |= {name: partial(index.search, q, K) for name, index in indexes.items()}
        if turbovec is not None and bits in (2, 4):
            turbo = turbovec.TurboQuantIndex(dim, bits)
            turbo.add(x)
            providers["turbovec"] = lambda: turbo.search(q, K)
        pairs = len(q) * len(x)
        return Workload(
            providers=providers,
            verify=missed,
            tolerance=1,
            amount=pairs,
            unit="pair",
            demands={"int8": 2.0 * pairs * dim},
            goals=[Faster(name, 3.0) for name in indexes],
        )

    return setup


def _faiss_indexes(bits: int, dim: int, query_bits: int) -> dict[str, Any]:
    inner = faiss.METRIC_INNER_PRODUCT

    def rotated(index: Any) -> Any:
        index.qb = query_bits
        return faiss.IndexPreTransform(faiss.RandomRotationMatrix(dim, dim), index)

    indexes = {"FAISS RaBitQ": rotated(faiss.IndexRaBitQ(dim, inner, bits))}
    if bits <= 4:
        # `bits` bits per dimension, as 4-bit codes of sub-vectors.
        indexes["FAISS PQ fast-scan"] = faiss.IndexPQFastScan(dim, dim * bits // 4, 4, inner)
    if bits == 1:
        indexes["FAISS RaBitQ fast-scan"] = rotated(faiss.IndexRaBitQFastScan(dim, inner))
    if bits in (4, 8):
        kind = faiss.ScalarQuantizer.QT_4bit if bits == 4 else faiss.ScalarQuantizer.QT_8bit
        indexes[f"FAISS SQ{bits}"] = faiss.IndexScalarQuantizer(dim, kind, inner)
    return indexes


def _encode(bits: int, dim: int) -> Callable[[Context], Workload]:
    def setup(context: Context) -> Workload:
        x, _ = _vectors(200 if context.quick else 5000, dim, 1)
        quantizers = {
            OURS: fastembed.ScalarQuantizer.fit(x, bits),
            "fastembed osq": fastembed.ScalarQuantizer.fit(x, bits, method="osq"),
        }
        theirs = faiss.IndexPreTransform(
            faiss.RandomRotationMatrix(dim, dim), faiss.IndexRaBitQ(dim, faiss.METRIC_INNER_PRODUCT, bits)
        )
        theirs.train(x)

        def add() -> None:
            theirs.reset()
            theirs.add(x)

        def lost(name: str, _: Any) -> float:
            """One less the mean cosine of what was encoded, centred, to its code."""
            if name not in quantizers:
                return 0.0
            quantizer = quantizers[name]
            whole = fastembed.ScalarQuantizer(dim, 8, "osq", "cosine", quantizer.centroid).encode(x).decode()
            decoded = quantizer.encode(x).decode()
            norms = np.linalg.norm(whole, axis=1) * np.linalg.norm(decoded, axis=1)
            return float(1 - ((whole * decoded).sum(axis=1) / norms).mean())

        providers: dict[str, Callable[[], Any]] = {
            name: partial(quantizer.encode, x) for name, quantizer in quantizers.items()
        }
        return Workload(
            providers={**providers, "FAISS RaBitQ": add},
            verify=lost,
            tolerance=0.5,
            amount=len(x),
            unit="row",
            goals=[Faster("FAISS RaBitQ", 1.0)],
        )

    return setup
