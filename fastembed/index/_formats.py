"""How rows are kept: codes to search, and vectors to re-score by. A row is a dictionary of columns, arrays whose first
axis counts rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._checks import UINT8, check_array, check_integer, check_number
from ..ops import _search_checks as checks
from ..ops import search as ops
from ..ops.search import SDCCodes
from ._inputs import check_vectors, row_chunks
from ._rows import Columns

# Results of one call of a kernel, at most.
RESULTS_AT_A_TIME = 1 << 22
# Rows that a search within a cosine asks for first; four times as many while they do not reach out of it.
_FIRST_WITHIN = 64
_WORST_COSINE, _WORST_DISTANCE = np.float32(-np.inf), np.int32(2**31 - 1)
METRICS = ("hamming", "sdc")
VECTOR_DTYPES = {"float32": np.float32, "float16": np.float16, "int8": np.int8}


@dataclass(frozen=True)
class Column:
    """What a column must be: dtype, and the width of its second axis (None: one axis)."""

    dtype: Any
    width: int | None = None


@dataclass(frozen=True)
class CodeFormat:
    """Codes of `bits` bits per dimension and the metric they are searched by.

    Columns: "codes" uint8 [N, bits * ceil(dim / 8)] and, for SDC, "inverse_norms" float32 [N], as `SDCCodes` has them.
    """

    dim: int
    bits: int
    metric: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "dim", check_integer("dim", self.dim, 1))
        if self.metric not in METRICS:
            raise ValueError(f"metric must be 'hamming' or 'sdc', got {self.metric!r}")
        object.__setattr__(self, "bits", check_integer("bits", self.bits, 1, checks.MAX_SDC_BITS))
        if self.metric == "hamming" and self.bits != 1:
            raise ValueError(f"bits must be 1 for metric 'hamming', got {self.bits}")

    @property
    def width(self) -> int:
        """Bytes of a code."""
        return self.bits * checks.code_bytes(self.dim)

    @property
    def best_is_largest(self) -> bool:
        return self.metric == "sdc"

    @property
    def worst(self) -> Any:
        """The value that fills up results where there is nothing to find."""
        return _WORST_COSINE if self.best_is_largest else _WORST_DISTANCE

    @property
    def columns(self) -> dict[str, Column]:
        codes = {"codes": Column(np.uint8, self.width)}
        return codes if self.metric == "hamming" else {**codes, "inverse_norms": Column(np.float32)}

    def encode(self, name: str, x: Any) -> Columns:
        """The columns of real vectors, which must be finite, or of codes, whose padding bits must be zero."""
        if isinstance(x, SDCCodes):
            if (x.bits, x.dim) != (self.bits, self.dim):
                raise ValueError(
                    f"{name} must have the {self.bits} bits and {self.dim} dims of the index, got {x.bits} and {x.dim}"
                )
            self._check_codes(name, x.codes)
            if not (np.isfinite(x.inverse_norms) & (x.inverse_norms > 0)).all():
                raise ValueError(f"{name} must have finite positive inverse_norms")
            # Copies: what the caller does to the codes later must not reach the index.
            return {name: np.array(getattr(x, name)) for name in self.columns}
        if x.dtype == np.uint8:
            if self.metric != "hamming":
                raise TypeError(f"{name} must be real vectors or SDCCodes for metric 'sdc', got uint8")
            self._check_codes(name, x)
            return {"codes": np.array(x)}
        check_vectors(name, x, self.dim)
        if self.metric == "hamming":
            return {"codes": ops.pack_bits(x)}
        codes = ops.sdc_encode(x, self.bits)
        return {name: getattr(codes, name) for name in self.columns}

    def topk(
        self,
        queries: Columns,
        columns: Columns,
        k: int,
        *,
        rows: np.ndarray | None = None,
        ranges: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(values [Q, k], row numbers int64 [Q, k]), best first, equal values by row; of these rows and these ranges of
        rows, if given. Where fewer are found, the rest is `worst` and -1."""
        if self.metric == "hamming":
            return ops.hamming_topk(queries["codes"], columns["codes"], k, ids=rows, ranges=ranges)
        return ops.sdc_topk(self.as_sdc(queries), self.as_sdc(columns), k, ids=rows, ranges=ranges)

    def within(
        self,
        queries: Columns,
        columns: Columns,
        radius: float,
        *,
        rows: np.ndarray | None = None,
        ranges: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(lims [Q + 1], values, row numbers) of the rows at least as good as `radius`, of these rows and ranges."""
        if self.metric == "hamming":
            return ops.hamming_range(queries["codes"], columns["codes"], int(radius), ids=rows, ranges=ranges)
        most = len(columns["codes"]) if rows is None else len(rows)
        count, k = len(queries["codes"]), min(_FIRST_WITHIN, most)
        numbers, values, places = [np.empty(0, np.int64)], [np.empty(0, np.float32)], [np.empty(0, np.int64)]
        left = np.arange(count)
        while len(left):
            not_done = []
            for some in np.array_split(left, -(-len(left) * k // RESULTS_AT_A_TIME)):
                few = {name: column[some] for name, column in queries.items()}
                found, found_rows = self.topk(
                    few, columns, k, rows=rows, ranges=None if ranges is None else ranges[some]
                )
                inside = (found >= radius) & (found_rows >= 0)
                done = ~inside[:, -1] | (k == most)
                inside &= done[:, None]
                numbers.append(np.repeat(some, inside.sum(axis=1)))
                values.append(found[inside])
                places.append(found_rows[inside])
                not_done.append(some[~done])
            left, k = np.concatenate(not_done), min(4 * k, most)
        number, value, place = (np.concatenate(parts) for parts in (numbers, values, places))
        order = np.argsort(number, kind="stable")
        lims = np.concatenate([[0], np.cumsum(np.bincount(number, minlength=count))])
        return lims, value[order], place[order]

    def check_radius(self, radius: Any) -> None:
        if self.metric == "hamming":
            check_integer("radius", radius, 0)
        else:
            check_number("radius", radius)

    def decode(self, columns: Columns) -> np.ndarray:
        """float32 [N, dim]: the vectors of unit length that the codes stand for."""
        codes = columns["codes"]
        if self.metric == "hamming":
            signs = 2 * np.unpackbits(codes, axis=1, count=self.dim).astype(np.float32) - 1
            return signs / np.float32(np.sqrt(self.dim))
        return self.as_sdc(columns).levels() * columns["inverse_norms"][:, None]

    def as_sdc(self, columns: Columns) -> SDCCodes:
        return SDCCodes(columns["codes"], columns["inverse_norms"], self.bits, self.dim)

    def check(self, columns: Columns) -> None:
        """Raise ValueError for columns that `encode` would not have made."""
        self._check_codes("codes", columns["codes"])
        norms = columns.get("inverse_norms", np.ones(1, np.float32))
        if not (np.isfinite(norms) & (norms > 0)).all():
            raise ValueError("inverse_norms must be finite and positive")

    def _check_codes(self, name: str, codes: np.ndarray) -> None:
        check_array(name, codes, 2, UINT8)
        if codes.shape[1] != self.width:
            raise ValueError(f"{name} must have the {self.width} bytes of the index, got {codes.shape[1]}")
        padding = 0xFF >> ((self.dim - 1) % 8 + 1)
        plane_ends = codes[:, checks.code_bytes(self.dim) - 1 :: checks.code_bytes(self.dim)]
        if padding and (plane_ends & padding).any():
            row = int(np.argmax((plane_ends & padding).any(axis=1)))
            raise ValueError(f"{name} must have zeros in the bits beyond dim {self.dim}, got others in row {row}")


@dataclass(frozen=True)
class VectorFormat:
    """Vectors kept for re-scoring, at unit length: codes ignore the length of a vector, and so does their re-scoring.

    Columns: "vectors" of the dtype, [N, dim]; for int8 also "vector_scales" float32 [N], 1 / L2 norm of each int8 row
    (0 for a row of zeros), so that the decoded vectors have unit length too.
    """

    dim: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in VECTOR_DTYPES:
            raise ValueError(f"rescore must be None or one of {', '.join(VECTOR_DTYPES)}, got {self.dtype!r}")

    @property
    def columns(self) -> dict[str, Column]:
        vectors = {"vectors": Column(VECTOR_DTYPES[self.dtype], self.dim)}
        return {**vectors, "vector_scales": Column(np.float32)} if self.dtype == "int8" else vectors

    def encode(self, x: np.ndarray) -> Columns:
        """The columns of finite vectors [N, dim]."""
        columns = {name: np.empty(_shape(len(x), column), column.dtype) for name, column in self.columns.items()}
        for start, chunk in row_chunks(x):
            rows = slice(start, start + len(chunk))
            chunk = unit_rows(chunk)
            if self.dtype == "int8":
                largest = np.abs(chunk).max(axis=1, keepdims=True)
                levels = np.rint(chunk * np.divide(127, largest, where=largest > 0, out=np.zeros_like(largest)))
                norms = np.sqrt(np.square(levels).sum(axis=1))
                columns["vector_scales"][rows] = np.divide(1, norms, where=norms > 0, out=np.zeros_like(norms))
                chunk = levels
            columns["vectors"][rows] = chunk
        return columns

    def decode(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """float32 [N, dim]."""
        vectors = columns["vectors"].astype(np.float32)
        return vectors * columns["vector_scales"][:, None] if self.dtype == "int8" else vectors

    def check(self, columns: Columns) -> None:
        """Raise ValueError for columns that `encode` would not have made."""
        for name in self.columns:
            values = columns[name]
            if values.dtype != np.int8:
                for _, chunk in row_chunks(values.reshape(len(values), -1)):
                    if not np.isfinite(chunk).all():
                        raise ValueError(f"{name} must be finite")


def unit_rows(x: np.ndarray) -> np.ndarray:
    """float32 [N, dim]: the vectors divided by their L2 norms; zeros stay zeros."""
    x = x.astype(np.float64 if x.dtype == np.float64 else np.float32)
    largest = np.abs(x).max(axis=1, keepdims=True)
    # By the largest magnitude first: squares neither overflow nor vanish.
    x = np.divide(x, largest, where=largest > 0, out=np.zeros_like(x)).astype(np.float32)
    norms = np.sqrt(np.square(x).sum(axis=1, keepdims=True))
    return np.divide(x, norms, where=norms > 0, out=np.zeros_like(x))


def _shape(rows: int, column: Column) -> tuple[int, ...]:
    return (rows,) if column.width is None else (rows, column.width)
