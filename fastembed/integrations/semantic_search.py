"""Search over codes with the results of `sentence_transformers.util.semantic_search`."""

from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from .._checks import are_tensors, check_integer
from ..index import BinaryIndex, IVFBinaryIndex
from ..nn.binarizer import finite_rows
from ..ops import _search_checks as checks
from ..ops.search import rescore, sdc_encode, sdc_topk
from ._cosines import search_cosines


def semantic_search(
    query_embeddings: np.ndarray | Tensor,
    corpus_embeddings: np.ndarray | Tensor | BinaryIndex | IVFBinaryIndex,
    top_k: int = 10,
    *,
    bits: int = 1,
    rescore_multiplier: int = 4,
) -> list[list[dict[str, int | float]]]:
    """The corpus embeddings of largest cosine to each query: a search over few-bit codes, whose first
    `rescore_multiplier * top_k` results are re-scored by the embeddings themselves.

    The results have the form that `sentence_transformers.util.semantic_search` gives with its default score, cosine;
    their scores are exact, but an embedding whose code ranks too low is missed.

    Args:
        query_embeddings: [Q, D], or [D] for one query; float32, float16, bfloat16 or float64 and finite.
        corpus_embeddings: [N, D], of the same kind (array or tensor), on the CPU. Or an index of them, which saves
            encoding the corpus at every call; if it keeps no vectors, scores are the cosines of codes.
        top_k: results for each query; all of them where the corpus is smaller.
        bits: bits of the codes for each dimension, 1 to 8; an index has its own.
        rescore_multiplier: candidates for each result wanted, at least 1.

    Returns:
        For each query a list of {"corpus_id": int, "score": float}, best first, equal scores by id.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    if isinstance(corpus_embeddings, BinaryIndex | IVFBinaryIndex):
        return _search_index(corpus_embeddings, query_embeddings, top_k, rescore_multiplier)
    are_tensors(query_embeddings=query_embeddings, corpus_embeddings=corpus_embeddings)
    if query_embeddings.ndim == 1:
        query_embeddings = query_embeddings[None]
    queries = _unit_rows("query_embeddings", query_embeddings)
    corpus = _unit_rows("corpus_embeddings", corpus_embeddings)
    if queries.shape[1] != corpus.shape[1]:
        raise ValueError(f"query_embeddings must have the {corpus.shape[1]} dims of the corpus, got {queries.shape[1]}")
    check_integer("top_k", top_k, 1)
    check_integer("bits", bits, 1, checks.MAX_SDC_BITS)
    check_integer("rescore_multiplier", rescore_multiplier, 1)
    if len(corpus) == 0:
        return [[] for _ in queries]
    k = min(top_k, len(corpus))
    _, candidates = sdc_topk(queries, sdc_encode(corpus, bits), min(k * rescore_multiplier, len(corpus)))
    return _hits(*rescore(queries, corpus, candidates, k))


def _search_index(
    index: BinaryIndex | IVFBinaryIndex, queries: Any, top_k: int, rescore_multiplier: int
) -> list[list[dict[str, int | float]]]:
    if are_tensors(query_embeddings=queries):
        queries = queries.detach()
    if queries.ndim == 1:
        queries = queries[None]
    check_integer("top_k", top_k, 1)
    check_integer("rescore_multiplier", rescore_multiplier, 1)
    if len(index) == 0:
        return [[] for _ in queries]
    return _hits(*search_cosines(index, queries, min(top_k, len(index)), rescore_multiplier=rescore_multiplier))


def _hits(scores: Any, ids: Any) -> list[list[dict[str, int | float]]]:
    return [
        [{"corpus_id": corpus_id, "score": score} for corpus_id, score in zip(*row, strict=True) if corpus_id >= 0]
        for row in zip(ids.tolist(), scores.tolist(), strict=True)
    ]


def _unit_rows(name: str, x: Any) -> Tensor:
    return F.normalize(finite_rows(name, x).float())
