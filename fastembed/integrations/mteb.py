"""A search backend for MTEB: its retrieval tasks, searched by codes.

mteb.models.SearchEncoderWrapper(model, index_backend=MTEBSearchIndex(bits=2, metric="sdc"))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..index import BinaryIndex
from ..index._inputs import to_numpy
from ._cosines import search_cosines


class MTEBSearchIndex:
    """`BinaryIndex` behind MTEB's protocol for search backends (`IndexEncoderSearchProtocol`), so that a task measures
    what codes lose. MTEB need not be installed for it.

    Scores are cosines, of the vectors or of what the codes stand for, whatever similarity the model names.

    Args:
        bits, metric, rescore: as for `BinaryIndex`; its dim is that of the first documents.
        rescore_multiplier: as for `BinaryIndex.search`.
    """

    def __init__(
        self, bits: int = 1, metric: str = "hamming", *, rescore: str | None = None, rescore_multiplier: int = 4
    ) -> None:
        self._settings: dict[str, Any] = {"bits": bits, "metric": metric, "rescore": rescore}
        self._multiplier = rescore_multiplier
        self.clear()

    def clear(self) -> None:
        """Forget all documents."""
        self._index: BinaryIndex | None = None
        self._rows: dict[str, int] = {}

    def add_documents(self, embeddings: Any, idxs: list[str]) -> None:
        """Add embeddings [N, dim] of documents with these names.

        Raises:
            ValueError: not one name for each embedding, or one that is there already.
        """
        embeddings = to_numpy("embeddings", embeddings)
        if len(idxs) != len(embeddings):
            raise ValueError(f"idxs must be one for each of the {len(embeddings)} embeddings, got {len(idxs)}")
        rows = self._rows | {name: len(self._rows) + row for row, name in enumerate(idxs)}
        if len(rows) != len(self._rows) + len(idxs):
            raise ValueError("idxs must be distinct and not among those added before")
        if self._index is None:
            self._index = BinaryIndex(embeddings.shape[1], **self._settings)
        self._index.add(embeddings)
        self._rows = rows

    def search(
        self,
        embeddings: Any,
        top_k: int,
        similarity_fn: Callable[..., Any] | None = None,
        top_ranked: dict[str, list[str]] | None = None,
        query_idx_to_id: dict[int, str] | None = None,
    ) -> tuple[list[list[float]], list[list[int]]]:
        """The scores and row numbers of the best documents for each query; with `top_ranked`, of the documents that it
        names for each query's name, numbered in its order.

        Raises:
            ValueError: there are no documents, or no names of queries beside `top_ranked`.
        """
        if self._index is None:
            raise ValueError("add_documents must come before search")
        embeddings = to_numpy("embeddings", embeddings)
        if top_ranked is None:
            scores, ids = self._scored(embeddings, min(top_k, len(self._index)), None)
            return scores.tolist(), ids.tolist()
        if query_idx_to_id is None:
            raise ValueError("query_idx_to_id must be given with top_ranked")
        every_score, every_place = [], []
        for number in range(len(embeddings)):
            named = [self._rows[name] for name in top_ranked.get(query_idx_to_id[number], [])]
            place = {row: place for place, row in enumerate(named)}
            scores, ids = np.empty((1, 0)), np.empty((1, 0))
            if named:
                scores, ids = self._scored(embeddings[number : number + 1], min(top_k, len(place)), named)
            every_score.append(scores[0].tolist())
            every_place.append([place[row] for row in ids[0].tolist()])
        return every_score, every_place

    def _scored(self, queries: np.ndarray, k: int, rows: list[int] | None) -> tuple[np.ndarray, np.ndarray]:
        assert self._index is not None
        return search_cosines(self._index, queries, k, filter=rows, rescore_multiplier=self._multiplier)
