"""How well codes search a real corpus, at equal bytes: our trained and plain codes, RaBitQ, product quantisation.

The pairs of the demo's corpus are split in two halves. What is trained (the binarisers, the FAISS indexes) sees the
training half alone. Queries are those of the held-out half, and they search the documents of both halves, so that every
right answer is a document that nothing was trained on.

An older binariser has two thirds of the dims and saw half of the training pairs. Its codes of the documents are also
searched by queries of two newer ones, which saw all of them: one trained to be compatible with it, one not.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import faiss
import numpy as np

import fastembed

K = 10
CANDIDATES = 4 * K
SEED = 0


@dataclass(frozen=True)
class Row:
    """One way to search.

    Attributes:
        method: what searched.
        stored_bytes: per document, of the codes alone.
        labelled: share of held-out queries whose one right document is among the first 10.
        relative: `labelled` over that of the float vectors.
        overlap: mean share of the float vectors' first 10 that is among the first 10.
    """

    method: str
    stored_bytes: int
    labelled: float
    relative: float
    overlap: float


@dataclass(frozen=True)
class Split:
    """Unit embeddings of the pairs; the first half of the rows is for training."""

    queries: np.ndarray
    documents: np.ndarray

    @property
    def half(self) -> int:
        return len(self.queries) // 2

    @property
    def asked(self) -> np.ndarray:
        return self.queries[self.half :]

    @property
    def seen(self) -> np.ndarray:
        return self.documents[: self.half]


def table(queries: np.ndarray, documents: np.ndarray, epochs: int = 8, progress: bool = True) -> list[Row]:
    """Every method on one corpus: pair i is queries[i] and documents[i], float32 of unit length."""
    split = Split(np.ascontiguousarray(queries), np.ascontiguousarray(documents))
    exact = faiss.IndexFlatIP(documents.shape[1])
    exact.add(split.documents)
    _, truth = exact.search(split.asked, K)
    right = np.arange(split.half, len(queries))[:, None]
    best = (truth == right).any(axis=1).mean()

    def row(method: str, stored_bytes: int, ids: np.ndarray) -> Row:
        labelled = float((ids == right).any(axis=1).mean())
        overlap = float((ids[:, :, None] == truth[:, None]).any(axis=1).mean())
        return Row(method, stored_bytes, labelled, labelled / best, overlap)

    rows = [row("float32", 4 * documents.shape[1], truth)]
    methods = (*_ours(split, epochs, progress), *_compatible(split, epochs, progress), *_scalar(split), *_faiss(split))
    for method, stored_bytes, search in methods:
        rows.append(row(method, stored_bytes, search(K)))
        rescored = fastembed.rescore(split.asked, split.documents, search(CANDIDATES), K)[1]
        rows.append(row(f"{method}, {CANDIDATES} re-scored", stored_bytes, rescored))
    return rows


Method = tuple[str, int, Callable[[int], np.ndarray]]


def _ours(split: Split, epochs: int, progress: bool) -> Iterator[Method]:
    for bits in (1, 2):
        plain = fastembed.sdc_encode(split.documents, bits)
        yield _of_codes(f"sign codes, {bits} bit", plain, fastembed.sdc_encode(split.asked, bits))
        pairs = (split.queries[: split.half], split.seen)
        for name, data in (("pairs", pairs), ("no pairs", (np.concatenate(pairs),))):
            binarizer = fastembed.train_binarizer(*data, bits=bits, epochs=epochs, seed=SEED, progress=progress)
            codes = binarizer.encode(split.documents)
            yield _of_codes(f"trained, {bits} bit, {name}", codes, binarizer.encode(split.asked))


def _compatible(split: Split, epochs: int, progress: bool) -> Iterator[Method]:
    train = partial(fastembed.train_binarizer, bits=2, epochs=epochs, progress=progress)
    few, dims = split.half // 2, 2 * split.documents.shape[1] // 3
    older = train(split.queries[:few], split.seen[:few], dims=dims, seed=SEED)
    codes = older.encode(split.documents)
    pairs = split.queries[: split.half], split.seen
    newer = train(*pairs, seed=SEED + 1, compatible_with=older)
    stranger = train(*pairs, seed=SEED + 1)
    yield _of_codes("older", codes, older.encode(split.asked))
    yield _of_codes("newer, compatible", newer.encode(split.documents), newer.encode(split.asked))
    yield _of_codes("older codes, compatible queries", codes, newer.encode(split.asked, dims=dims))
    yield _of_codes("older codes, other queries", codes, stranger.encode(split.asked, dims=dims))


def _of_codes(name: str, codes: fastembed.SDCCodes, asked: fastembed.SDCCodes) -> Method:
    # With 1 bit every norm is the same and need not be stored.
    stored = codes.nbytes // len(codes) if codes.bits > 1 else codes.codes.shape[1]
    return name, stored, lambda k: fastembed.sdc_topk(asked, codes, k)[1]


def _scalar(split: Split) -> Iterator[Method]:
    for bits in (1, 2, 4):
        for name, method in (("RaBitQ", "rabitq"), ("optimised scalar", "osq")):
            quantizer = fastembed.ScalarQuantizer.fit(split.seen, bits, method=method)
            codes, asked = quantizer.encode(split.documents), quantizer.encode_queries(split.asked)
            yield f"{name}, {bits} bit", codes.nbytes // len(codes), partial(_scalar_ids, asked, codes)


def _scalar_ids(asked: fastembed.ScalarCodes, codes: fastembed.ScalarCodes, k: int) -> np.ndarray:
    return fastembed.scalar_topk(asked, codes, k)[1]


def _faiss(split: Split) -> Iterator[Method]:
    dim = split.documents.shape[1]
    for bits in (1, 2):
        quantizer: Any = faiss.IndexRaBitQ(dim, faiss.METRIC_INNER_PRODUCT, bits)
        quantizer.qb = 8
        # FAISS leaves the rotation that RaBitQ needs to its user.
        index = faiss.IndexPreTransform(faiss.RandomRotationMatrix(dim, dim), quantizer)
        yield _of_index(f"FAISS RaBitQ, {bits} bit", quantizer.code_size, index, split)
        parts = dim * bits // 8
        product = faiss.IndexPQ(dim, parts, 8, faiss.METRIC_INNER_PRODUCT)
        yield _of_index(f"FAISS PQ {parts}x8", parts, product, split)


def _of_index(name: str, stored_bytes: int, index: faiss.Index, split: Split) -> Method:
    index.train(split.seen)
    index.add(split.documents)
    return name, stored_bytes, lambda k: index.search(split.asked, k)[1]
