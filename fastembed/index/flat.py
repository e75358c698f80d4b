"""`BinaryIndex`: every row is searched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ._base import CodeIndex

if TYPE_CHECKING:
    from typing import Self


class BinaryIndex(CodeIndex):
    """An exact index of binary or few-bit codes that rows are added to, removed from and updated in, also while other
    threads search: a search sees exactly the rows there were when it began.

    Vectors and codes are NumPy arrays (PyTorch is not needed) or tensors; search returns what the queries are. Codes
    are kept in memory or mapped from a file, as the kernels read them.

    Args:
        dim: dimensions of the vectors, at least 1.
        bits: bits of a code for each dimension, 1 to 8; 1 for metric "hamming".
        metric: "hamming": distance of the sign bits, smaller is better. "sdc": cosine of the vectors that the codes of
            both sides stand for, larger is better (`sdc_topk`).
        rescore: keep the vectors too, at unit length, as "float32", "float16" or "int8" (scaled per vector), and order
            the best candidates by their cosine with the query. Codes find candidates at a fraction of the bytes.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: Gan et al., "Binary Embedding-based Retrieval at Tencent", KDD 2023, arXiv 2302.08714 (SDC).
    """

    kind = "flat"

    def __init__(self, dim: int, bits: int = 1, metric: str = "hamming", *, rescore: str | None = None) -> None:
        super().__init__(dim, bits, metric, rescore)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings().items())
        return f"BinaryIndex({settings}): {len(self)} rows"

    def search(
        self, queries: Any, k: int, *, filter: Any = None, vectors: Any = None, rescore_multiplier: int = 4
    ) -> tuple[Any, Any]:
        """The k best rows for each query, exactly.

        Args:
            queries: [Q, dim] real vectors, or codes as `add` takes them.
            k: results for each query, 1 to len(index).
            filter: the ids that may be found: a boolean mask indexed by id (ids beyond its end are left out), or a list
                of ids (those that the index does not hold do not matter). Default: all.
            vectors: the real vectors [Q, dim] to re-score with; default the queries. Needed where those are codes.
            rescore_multiplier: where the index keeps vectors, the first rescore_multiplier * k rows by their codes are
                ordered by the cosine of the vectors; 0 leaves the order of the codes. Without vectors it does not
                matter.

        Returns:
            (values [Q, k], ids int64 [Q, k]), best first, equal values by id: int32 distances for metric "hamming";
            float32 cosines for "sdc", and wherever rows are re-scored. If a filter lets fewer than k rows pass, the
            last ids are -1, with the largest int32 or minus infinity.

        Raises:
            TypeError, ValueError: an argument is not as above, or k is larger than the index.
        """
        return self._search(queries, k, filter, vectors, rescore_multiplier)

    def range_search(self, queries: Any, radius: float, *, filter: Any = None) -> tuple[Any, Any, Any]:
        """All rows near each query, exactly.

        Args:
            queries, filter: as for `search`.
            radius: the largest distance, at least 0, for metric "hamming"; the smallest cosine for "sdc". A row just at
                it is found. Nothing is re-scored.

        Returns:
            (lims int64 [Q + 1], values, ids int64): results lims[q] up to lims[q + 1] are those of query q, best first,
            equal values by id.

        Raises:
            TypeError, ValueError: an argument is not as above.
        """
        return self._range_search(queries, radius, filter)

    @classmethod
    def _from_settings(cls, settings: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> Self:
        return cls(**settings)
