"""A search of a state: of its runs one after another, and of what they gave."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ._formats import RESULTS_AT_A_TIME, CodeFormat
from ._rows import Columns, Filter, Run, State, selected_rows

# Rows beyond those wanted that a search of lists asks for, to see where the last tie ends.
_BEYOND = 16
# From a list to the places of its first row and the one past its last in `Run.starts`.
_ENDS = np.array([0, 1])


@dataclass(frozen=True)
class _Scan:
    """What a search looks at in one run.

    Attributes:
        offset: position of the first row of the run.
        rows: int64, ascending; None for all.
        ranges: int64 [Q, n, 2], the first row and the one past the last of each list to look into; None for all.
    """

    run: Run
    offset: int
    rows: np.ndarray | None
    ranges: np.ndarray | None

    @property
    def most(self) -> int:
        """Rows that it can find."""
        return len(self.run) if self.rows is None else len(self.rows)


def _scans(state: State, allowed: Filter | None, probed: np.ndarray | None) -> Iterator[_Scan]:
    for run, offset in state.located():
        ranges = None if probed is None else run.starts[probed[..., None] + _ENDS]
        scan = _Scan(run, offset, selected_rows(run, allowed), ranges)
        if scan.most:
            yield scan


def best_rows(
    codes: CodeFormat, state: State, queries: Columns, k: int, allowed: Filter | None, probed: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(values [Q, k], positions [Q, k]) of the best rows by their codes, ordered by value and id; where fewer are
    found, the rest is `codes.worst` and -1. `probed` [Q, n] names the lists to look into; None: all."""
    found = []
    for scan in _scans(state, allowed, probed):
        wanted = min(k, scan.most)
        if scan.ranges is None:
            values, places = codes.topk(queries, scan.run.columns, wanted, rows=scan.rows)
            if wanted == k and len(state.runs) == 1:
                return values, places
        else:
            values, places = _topk_of_lists(codes, queries, scan.run, wanted, scan.rows, scan.ranges)
        found.append((values, np.where(places < 0, -1, places + scan.offset)))
    if sum(values.shape[1] for values, _ in found) < k:
        shape = (len(queries["codes"]), k)
        found.append((np.full(shape, codes.worst), np.full(shape, -1)))
    values, positions = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    return best_by_id(values, positions, state.ids_at(positions), k, largest=codes.best_is_largest)


def _topk_of_lists(
    codes: CodeFormat, queries: Columns, run: Run, k: int, rows: np.ndarray | None, ranges: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """k rows or more in the ranges, in any order, with the k best by value and id among them.

    Kernels leave ties to the smaller row, and ids ascend with rows only within a list. Where a tie of the k-th row
    reaches beyond the rows asked for, every list of that query is searched by itself.
    """
    values, places = codes.topk(queries, run.columns, min(k + _BEYOND, len(run)), rows=rows, ranges=ranges)
    if values.shape[1] == len(run):
        return values, places
    cut = np.nonzero((values[:, k - 1] == values[:, -1]) & (places[:, -1] >= 0))[0]
    values[cut, k:], places[cut, k:] = codes.worst, -1
    lists = ranges.shape[1]
    step = max(1, RESULTS_AT_A_TIME // (lists * k))
    for start in range(0, len(cut), step):
        some = cut[start : start + step]
        repeated = {name: np.repeat(column[some], lists, axis=0) for name, column in queries.items()}
        parts = codes.topk(repeated, run.columns, k, rows=rows, ranges=ranges[some].reshape(-1, 1, 2))
        of_lists, rows_of_lists = (part.reshape(len(some), -1) for part in parts)
        ids = np.where(rows_of_lists < 0, -1, run.ids_of(rows_of_lists))
        values[some, :k], places[some, :k] = best_by_id(of_lists, rows_of_lists, ids, k, largest=codes.best_is_largest)
    return values, places


def rows_within(
    codes: CodeFormat, state: State, queries: Columns, radius: float, allowed: Filter | None, probed: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lims [Q + 1], values, ids) of the rows at least as good as `radius`: those of query q stand from lims[q] up to
    lims[q + 1], ordered by value and id."""
    numbers, values, ids = [np.empty(0, np.int64)], [np.empty(0, codes.worst.dtype)], [np.empty(0, np.int64)]
    for scan in _scans(state, allowed, probed):
        lims, found, places = codes.within(queries, scan.run.columns, radius, rows=scan.rows, ranges=scan.ranges)
        numbers.append(np.repeat(np.arange(len(lims) - 1), np.diff(lims)))
        values.append(found)
        ids.append(scan.run.ids_of(places))
    number, value, row_ids = (np.concatenate(parts) for parts in (numbers, values, ids))
    order = np.lexsort((row_ids, -value if codes.best_is_largest else value, number))
    sizes = np.bincount(number, minlength=len(queries["codes"]))
    return np.concatenate([[0], np.cumsum(sizes)]), value[order], row_ids[order]


def best_by_id(
    values: np.ndarray, rows: np.ndarray, ids: np.ndarray, k: int, *, largest: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The k best columns of each query by value and id, those of id -1 last: (values [Q, k], rows [Q, k])."""
    order = np.lexsort((ids, -values if largest else values, ids < 0), axis=1)[:, :k]
    return np.take_along_axis(values, order, 1), np.take_along_axis(rows, order, 1)
