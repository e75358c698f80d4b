"""Results of several searches become one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ._formats import CodeFormat
from ._rows import State


def best_of(
    found: Sequence[tuple[np.ndarray, np.ndarray]], queries: int, k: int, codes: CodeFormat, state: State
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of (values [Q, n], positions [Q, n]), n at will, by value and id; filled with `codes.worst` and -1."""
    if len(found) == 1 and found[0][0].shape[1] == k:
        return found[0]
    blank = np.full((queries, k), codes.worst), np.full((queries, k), -1)
    values, positions = (np.concatenate(parts, axis=1) for parts in zip(*found, blank, strict=True))
    ids = state.ids_at(positions)
    # What fills up comes after everything found.
    order = np.lexsort((ids, -values if codes.best_is_largest else values, positions < 0), axis=1)[:, :k]
    return np.take_along_axis(values, order, 1), np.take_along_axis(positions, order, 1)
