"""Search results of any index as cosines, which is what other libraries expect."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..index import BinaryIndex, IVFBinaryIndex


def search_cosines(
    index: BinaryIndex | IVFBinaryIndex, queries: Any, k: int, **how: Any
) -> tuple[np.ndarray, np.ndarray]:
    """(cosines float32 [Q, k], ids int64 [Q, k]) of `index.search`: of the vectors where rows are re-scored, otherwise
    of what the codes stand for."""
    values, ids = (np.asarray(part.cpu() if hasattr(part, "cpu") else part) for part in index.search(queries, k, **how))
    if values.dtype == np.int32:
        values = (1 - 2 * values / index.dim).astype(np.float32)  # of the signs
    return values, ids
