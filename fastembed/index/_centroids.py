"""Which lists a row or a query belongs to: centroids that are codes, or vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ops import _search_checks as checks
from ..ops.search import hamming_topk, rescore
from ._formats import CodeFormat, unit_rows
from ._inputs import is_codes, row_chunks
from ._rows import Columns

if TYPE_CHECKING:
    from typing import Self

# Rows that are compared with all centroids at a time.
_ROWS = 1 << 16


class Centroids(ABC):
    """Attributes:
    values: the centroids, one a row.
    """

    def __init__(self, codes: CodeFormat, values: np.ndarray) -> None:
        self.codes, self.values = codes, values

    @classmethod
    @abstractmethod
    def trained(
        cls, codes: CodeFormat, x: Any, columns: Columns, count: int, iterations: int, rng: np.random.Generator
    ) -> Self:
        """`count` centroids of rows, given as they came and encoded."""

    @classmethod
    @abstractmethod
    def checked(cls, codes: CodeFormat, values: np.ndarray, count: int) -> Self:
        """The centroids of a file; ValueError for what `trained` would not have made."""

    @abstractmethod
    def nearest(self, x: Any, columns: Columns, count: int) -> np.ndarray:
        """int64 [N, count]: the nearest centroids of each row, nearest first, equally near ones by number. What a row
        gets does not depend on the others."""

    @abstractmethod
    def nearest_one(self, x: Any, columns: Columns) -> np.ndarray:
        """int64 [N]: the nearest centroid of each row."""


class BinaryCentroids(Centroids):
    """Codes of one bit, uint8 [lists, ceil(dim / 8)], met by the sign bits of a row, the first plane of its code."""

    @classmethod
    def trained(
        cls, codes: CodeFormat, x: Any, columns: Columns, count: int, iterations: int, rng: np.random.Generator
    ) -> Self:
        signs = _sign_plane(codes, columns)
        centroids = cls(codes, signs[_starting_rows(len(signs), count, rng)])
        lists = np.empty(0)
        for _ in range(iterations):
            before, lists = lists, centroids.nearest_one(x, columns)
            if np.array_equal(lists, before):
                break
            centroids = cls(codes, _majorities(signs, lists, centroids.values, rng))
        return centroids

    @classmethod
    def checked(cls, codes: CodeFormat, values: np.ndarray, count: int) -> Self:
        if (values.dtype, values.shape) != (np.uint8, (count, checks.code_bytes(codes.dim))):
            raise ValueError(f"centroids is {values.dtype} {list(values.shape)}")
        return cls(codes, values)

    def nearest(self, x: Any, columns: Columns, count: int) -> np.ndarray:
        return hamming_topk(_sign_plane(self.codes, columns), self.values, count)[1]

    def nearest_one(self, x: Any, columns: Columns) -> np.ndarray:
        lists = np.empty(len(columns["codes"]), np.int64)
        for start in range(0, len(lists), _ROWS):
            rows = {"codes": columns["codes"][start : start + _ROWS]}
            lists[start : start + _ROWS] = self.nearest(x, rows, 1)[:, 0]
        return lists


class FloatCentroids(Centroids):
    """Vectors of unit length, float32 [lists, dim], met by real vectors, or by what codes stand for."""

    @classmethod
    def trained(
        cls, codes: CodeFormat, x: Any, columns: Columns, count: int, iterations: int, rng: np.random.Generator
    ) -> Self:
        rows = np.concatenate([chunk for _, chunk in _unit_chunks(codes, x, columns)])
        centroids = cls(codes, rows[_starting_rows(len(rows), count, rng)])
        lists = np.empty(0)
        for _ in range(iterations):
            before, lists = lists, centroids.nearest_one(rows, columns)
            if np.array_equal(lists, before):
                break
            centroids = cls(codes, _means(rows, lists, count, rng))
        return centroids

    @classmethod
    def checked(cls, codes: CodeFormat, values: np.ndarray, count: int) -> Self:
        if (values.dtype, values.shape) != (np.float32, (count, codes.dim)):
            raise ValueError(f"centroids is {values.dtype} {list(values.shape)}")
        if not np.isfinite(values).all():
            raise ValueError("centroids must be finite")
        return cls(codes, values)

    def nearest(self, x: Any, columns: Columns, count: int) -> np.ndarray:
        # By the kernel whose sums have one order: a matrix product's depend on the number of rows.
        everything = np.arange(len(self.values))
        found = [
            rescore(chunk, self.values, np.broadcast_to(everything, (len(chunk), len(everything))), count)[1]
            for _, chunk in _unit_chunks(self.codes, x, columns)
        ]
        return np.concatenate(found) if found else np.empty((0, count), np.int64)

    def nearest_one(self, x: Any, columns: Columns) -> np.ndarray:
        lists = np.empty(len(columns["codes"]), np.int64)
        for start, chunk in _unit_chunks(self.codes, x, columns):
            lists[start : start + len(chunk)] = (chunk @ self.values.T).argmax(axis=1)
        return lists


def _sign_plane(codes: CodeFormat, columns: Columns) -> np.ndarray:
    return columns["codes"][:, : checks.code_bytes(codes.dim)]


def _unit_chunks(codes: CodeFormat, x: Any, columns: Columns) -> Any:
    """(first row, vectors of unit length) of pieces of the rows."""
    if not is_codes(x):
        return ((start, unit_rows(chunk)) for start, chunk in row_chunks(x))
    return (
        (start, codes.decode({name: column[start : start + _ROWS] for name, column in columns.items()}))
        for start in range(0, len(columns["codes"]), _ROWS)
    )


def _starting_rows(rows: int, count: int, rng: np.random.Generator) -> np.ndarray:
    return rng.choice(rows, count, replace=False)


def _by_list(lists: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows in the order of their lists, and how many each list has."""
    return np.argsort(lists, kind="stable"), np.bincount(lists, minlength=count)


def _majorities(signs: np.ndarray, lists: np.ndarray, before: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The majority of each bit in each list; where there is none, the bit of before; for an empty list, any row."""
    order, sizes = _by_list(lists, len(before))
    majorities = before.copy()
    done = 0
    for group in np.array_split(np.nonzero(sizes)[0], max(1, signs.size >> 22)):
        if len(group) == 0:
            continue
        ends = np.cumsum(sizes[group])
        bits = np.unpackbits(signs[order[done : done + ends[-1]]], axis=1)
        ones = 2 * np.add.reduceat(bits, ends - sizes[group], axis=0, dtype=np.int64)
        half = sizes[group, None]
        old = np.unpackbits(before[group], axis=1) == 1
        majorities[group] = np.packbits((ones > half) | ((ones == half) & old), axis=1)
        done += int(ends[-1])
    empty = np.nonzero(sizes == 0)[0]
    majorities[empty] = signs[rng.integers(0, len(signs), len(empty))]
    return majorities


def _means(rows: np.ndarray, lists: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """The direction of the mean of each list; for an empty list, any row."""
    order, sizes = _by_list(lists, count)
    filled = sizes > 0
    means = np.empty((count, rows.shape[1]), np.float32)
    starts = (np.cumsum(sizes) - sizes)[filled]
    means[filled] = unit_rows(np.add.reduceat(rows[order], starts, axis=0))
    means[~filled] = rows[rng.integers(0, len(rows), int((~filled).sum()))]
    return means
