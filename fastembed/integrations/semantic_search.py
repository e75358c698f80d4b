"""Search over codes with the arguments and results of `sentence_transformers.util.semantic_search`."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import check_integer
from ..index import BinaryIndex, IVFBinaryIndex
from ..nn.binarizer import finite_rows
from ..ops._search_checks import MAX_SDC_BITS
from ..ops.search import rescore, sdc_encode, sdc_topk
from ._cosines import search_cosines

Embeddings = np.ndarray | Tensor | Sequence[Any]
_COSINES = ("cos_sim", "pytorch_cos_sim")


def semantic_search(
    query_embeddings: Embeddings,
    corpus_embeddings: Embeddings | BinaryIndex | IVFBinaryIndex,
    query_chunk_size: int = 100,
    corpus_chunk_size: int = 500_000,
    top_k: int = 10,
    score_function: Callable[..., Any] | None = None,
    *,
    bits: int = 1,
    rescore_multiplier: int = 4,
) -> list[list[dict[str, int | float]]]:
    """The corpus embeddings of largest cosine to each query: a search over few-bit codes, whose first
    `rescore_multiplier * top_k` results are re-scored by the embeddings themselves.

    Scores are exact, but an embedding whose code ranks too low is missed.

    Args:
        query_embeddings: [Q, D], or [D] for one query; float32, float16, bfloat16 or float64 and finite. An array, a
            tensor, or a list of arrays, of tensors or of lists of numbers.
        corpus_embeddings: [N, D], likewise, on the CPU. Or an index of them, which saves encoding the corpus at every
            call; if it keeps no vectors, scores are the cosines of codes.
        query_chunk_size, corpus_chunk_size: for calls by position; results do not depend on them, here or there.
        top_k: results for each query; all of them where the corpus is smaller.
        score_function: None or `util.cos_sim`; `util.dot_score` where all embeddings have unit length, which makes it
            the same.
        bits: bits of the codes for each dimension, 1 to 8; an index has its own.
        rescore_multiplier: candidates for each result wanted, at least 1.

    Returns:
        For each query a list of {"corpus_id": int, "score": float}, best first, equal scores by id.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    queries = finite_rows("query_embeddings", _rows(query_embeddings, one=True)).float()
    top_k = check_integer("top_k", top_k, 1)
    rescore_multiplier = check_integer("rescore_multiplier", rescore_multiplier, 1)
    if isinstance(corpus_embeddings, list | tuple) and not corpus_embeddings:
        return [[] for _ in queries]
    if isinstance(corpus_embeddings, BinaryIndex | IVFBinaryIndex):
        _check_score_function(score_function, queries)
        if len(corpus_embeddings) == 0:
            return [[] for _ in queries]
        k = min(top_k, len(corpus_embeddings))
        return _hits(*search_cosines(corpus_embeddings, queries, k, rescore_multiplier=rescore_multiplier))
    corpus = finite_rows("corpus_embeddings", _rows(corpus_embeddings)).float()
    if queries.shape[1] != corpus.shape[1]:
        raise ValueError(f"query_embeddings must have the {corpus.shape[1]} dims of the corpus, got {queries.shape[1]}")
    check_integer("bits", bits, 1, MAX_SDC_BITS)
    _check_score_function(score_function, queries, corpus)
    if len(corpus) == 0:
        return [[] for _ in queries]
    queries, corpus = F.normalize(queries), F.normalize(corpus)
    k = min(top_k, len(corpus))
    _, candidates = sdc_topk(queries, sdc_encode(corpus, bits), min(k * rescore_multiplier, len(corpus)))
    return _hits(*rescore(queries, corpus, candidates, k))


def _rows(embeddings: Any, *, one: bool = False) -> Any:
    """Lists as a tensor; with `one`, a single embedding as a row."""
    if isinstance(embeddings, list | tuple):
        stacked = len(embeddings) > 0 and isinstance(embeddings[0], Tensor)
        embeddings = torch.stack(tuple(embeddings)) if stacked else torch.from_numpy(np.asarray(embeddings))
    return embeddings[None] if one and getattr(embeddings, "ndim", 0) == 1 else embeddings


def _check_score_function(score_function: Any, *embeddings: Tensor) -> None:
    name = getattr(score_function, "__name__", score_function)
    if score_function is None or name in _COSINES:
        return
    if name != "dot_score":
        raise ValueError(f"score_function must be util.cos_sim or util.dot_score, got {name!r}")
    for rows in embeddings:
        if not torch.allclose(rows.norm(dim=1), torch.ones(len(rows)), atol=1e-3):
            raise ValueError("score_function must be util.cos_sim unless all embeddings have unit length")


def _hits(scores: Any, ids: Any) -> list[list[dict[str, int | float]]]:
    return [
        [{"corpus_id": corpus_id, "score": score} for corpus_id, score in zip(*row, strict=True) if corpus_id >= 0]
        for row in zip(ids.tolist(), scores.tolist(), strict=True)
    ]
