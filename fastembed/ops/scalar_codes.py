"""Scalar quantisation: vectors as small integers and four numbers each, and the search over them. One form of code for
RaBitQ, optimised scalar quantisation, signs and recurrent binary embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .. import _native
from .._checks import FLOAT32, FLOATS, UINT8, are_tensors, check_array, check_integer
from . import _scalar_codes_checks as scalar_checks
from . import _scalar_codes_numpy
from . import _search_checks as checks
from .search import SDCCodes, _given

if TYPE_CHECKING:
    from torch import Tensor

    Array = TypeVar("Array", np.ndarray, Tensor)

if _native.torch is not None:
    from . import _scalar_codes_torch

# Rows that a centroid is summed of at a time.
_SUM_ROWS = 65536


@dataclass(frozen=True, eq=False)
class ScalarCodes:
    """Codes of N vectors, each of which stands for lower + step * c with integers c. `len(codes)` is N; `codes[rows]`
    selects rows by a slice, ids or a mask, a slice without copying.

    Attributes:
        codes: uint8 [N, bits * ceil(dim / 8)]. Bit planes of c one after another, the most significant first, each
            packed as by `pack_bits`, as in `SDCCodes`.
        factors: float32 [N, 4], finite: lower, step, the sum of c, and `extra`, which the score of the code is larger
            by than the inner product.
        bits: planes per code, 1 to 8; up to 15 if the codes are queries.
        dim: dimensions of the vectors encoded.
    """

    codes: Any
    factors: Any
    bits: int
    dim: int

    def __post_init__(self) -> None:
        scalar_checks.check_codes(self.codes, self.factors, self.bits, self.dim)

    @classmethod
    def from_sdc(cls, codes: SDCCodes) -> ScalarCodes:
        """Codes of `sdc_encode` or of a trained `nn.RecurrentBinarizer`, as unit vectors: scores are the cosines of
        `sdc_topk`, up to rounding. The packed codes are shared, not copied.

        Raises:
            TypeError: codes are no SDCCodes.
        """
        if not isinstance(codes, SDCCodes):
            raise TypeError(f"codes must be SDCCodes, got {type(codes).__name__}")
        norms = codes.inverse_norms
        sums = _ops(codes=codes.codes).scalar_integers(codes.codes, codes.bits, codes.dim).sum(1)
        return cls(
            codes.codes, _factors((1 - 2**codes.bits) * norms, 2 * norms, sums, 0 * norms), codes.bits, codes.dim
        )

    @classmethod
    def from_bits(cls, codes: Array, dim: int) -> ScalarCodes:
        """Binary codes of `pack_bits` as vectors of -1 and 1: scores are dim - 2 * Hamming distance, exactly.

        Args:
            codes: uint8 [N, ceil(dim / 8)], zero beyond dim. Shared, not copied.
            dim: bits of a code.
        """
        ops = _ops(codes=codes)
        check_array("codes", codes, 2, UINT8)
        checks.check_unpack_bits(codes, dim)
        sums = ops.scalar_integers(codes, 1, dim).sum(1)
        return cls(codes, _factors(0 * sums - 1, 0 * sums + 2, sums, 0 * sums), 1, dim)

    def __len__(self) -> int:
        return self.codes.shape[0]

    def __getitem__(self, rows: Any) -> ScalarCodes:
        if isinstance(rows, (int, np.integer, tuple)):
            raise TypeError(f"rows must be a slice, an array of ids or a mask, got {rows!r}")
        return ScalarCodes(self.codes[rows], self.factors[rows], self.bits, self.dim)

    @property
    def nbytes(self) -> int:
        """Bytes that the codes and their factors take."""
        return self.codes.nbytes + self.factors.nbytes

    def integers(self) -> Any:
        """The integers c: int32 [N, dim]."""
        return _ops(codes=self.codes).scalar_integers(self.codes, self.bits, self.dim)

    def decode(self) -> Any:
        """The vectors that the codes stand for, float32 [N, dim]: centred and rotated as their quantizer's."""
        lower, step = self.factors[:, :1], self.factors[:, 1:2]
        return lower + step * self.integers()


@dataclass(frozen=True, eq=False)
class ScalarQuantizer:
    """Encodes vectors as `ScalarCodes` of few bits for each dimension.

    Vectors are scaled to unit length (metric "cosine"), the centroid is subtracted, and they are rotated at random:
    by signs and Hadamard transforms, in O(D log D), any D. Then each is encoded by itself:

    - "rabitq": the grid of 2^bits levels around 0, scaled for the smallest angle to the vector; decoded so that inner
      products are estimated without bias. 1 bit: the signs.
    - "osq": the interval of each vector that loses least, errors along the vector weighing nine tenths (Lucene's
      optimised scalar quantisation).
    - "sign": signs, standing for a vector of the same length. 1 bit only.

    Args:
        dim: dimensions of the vectors, D.
        bits: bits per dimension, 1 to 8.
        method: as above.
        metric: what scores are: "cosine"; "ip", inner products; "l2", minus half the squared distance, so that larger
            is better for each of them.
        centroid: float32 [D], subtracted from the vectors; None for none. `fit` takes the mean of given vectors.
        rotation: whether vectors are rotated. RaBitQ's estimates assume it, the others gain where few dimensions carry
            most of the vectors.
        seed: of the rotation. The same seed and dim give the same rotation everywhere.

    Raises:
        TypeError, ValueError: a setting is not as above.

    Sources: Gao and Long, "RaBitQ", SIGMOD 2024, arXiv 2405.12497; Gao et al., "Practical and Asymptotically Optimal
    Quantization of High-Dimensional Vectors in Euclidean Space for Approximate Nearest Neighbor Search", SIGMOD 2025,
    arXiv 2409.09913; Apache Lucene, OptimizedScalarQuantizer.
    """

    dim: int
    bits: int
    method: str = "rabitq"
    metric: str = "cosine"
    centroid: Any = None
    rotation: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        scalar_checks.check_settings(self.dim, self.bits, self.method, self.metric, scalar_checks.MAX_BITS)
        check_integer("seed", self.seed, 0, 2**32 - 1)
        if self.centroid is None:
            return
        if are_tensors(centroid=self.centroid):
            object.__setattr__(self, "centroid", self.centroid.detach().cpu().numpy())
        check_array("centroid", self.centroid, 1, FLOAT32)
        if self.centroid.shape[0] != self.dim:
            raise ValueError(f"centroid must have {self.dim} dims, got {self.centroid.shape[0]}")
        if not np.isfinite(self.centroid).all():
            raise ValueError("centroid must be finite, got a NaN or infinity")

    @classmethod
    def fit(
        cls,
        x: Array,
        bits: int,
        *,
        method: str = "rabitq",
        metric: str = "cosine",
        rotation: bool = True,
        seed: int = 0,
    ) -> ScalarQuantizer:
        """A quantizer whose centroid is the mean of vectors; with metric "cosine" of the vectors scaled to unit length.

        Args:
            x: [N, D], N >= 1, float32, float16, bfloat16 or float64, finite; an array or a tensor.
            bits, method, metric, rotation, seed: as for the class.

        Raises:
            TypeError: x is neither an array nor a tensor, or of a wrong dtype; a setting is not as for the class.
            ValueError: x has a wrong shape, no rows, or a NaN or infinity; a setting is not as for the class.
        """
        are_tensors(x=x)
        check_array("x", x, 2, FLOATS)
        if x.shape[0] == 0:
            raise ValueError("x must have at least one row, got none")
        scalar_checks.check_settings(x.shape[1], bits, method, metric, scalar_checks.MAX_BITS)
        total = np.zeros(x.shape[1])
        for first in range(0, x.shape[0], _SUM_ROWS):
            some = _as_float64(x[first : first + _SUM_ROWS])
            if not np.isfinite(some).all():
                raise ValueError("x must be finite, got a NaN or infinity")
            if metric == "cosine":
                norms = np.linalg.norm(some, axis=1, keepdims=True)
                some = some / np.where(norms > 0, norms, 1)
            total += some.sum(axis=0)
        mean = (total / x.shape[0]).astype(np.float32)
        return cls(x.shape[1], bits, method, metric, mean, rotation, seed)

    def encode(self, x: Array) -> ScalarCodes:
        """Codes of vectors [N, D]: float32, float16, bfloat16 or float64 (computed as float32), an array or a tensor.
        Each row is encoded by itself: its code does not depend on the others.

        Raises:
            TypeError: x is neither an array nor a tensor, or of a wrong dtype.
            ValueError: a wrong shape, or a NaN or infinity in x.
        """
        return self._encode(x, self.bits, self.method)

    def encode_queries(self, queries: Array, bits: int = 8) -> ScalarCodes:
        """Codes of queries for a search among codes of this quantizer, which they may have more bits than (asymmetric
        estimation): each by its own optimised interval, whatever the method.

        Args:
            queries: [Q, D], as for `encode`.
            bits: 1 to 15. Up to 8 cost the same. From 9 on a query has two bytes for each dimension and takes twice
                the time: 15 bits do what queries of float32 would, their own error being a 256th of that of codes
                of 8 bits.
        """
        return self._encode(queries, bits, "osq")

    def _encode(self, x: Any, bits: int, method: str) -> ScalarCodes:
        ops = _ops(x=x)
        check_array("x", x, 2, FLOATS)
        if x.shape[1] != self.dim:
            raise ValueError(f"x must have the {self.dim} dims of the quantizer, got {x.shape[1]}")
        centroid, signs = (_like(x, some) for some in (self.centroid, self._signs))
        codes, factors = ops.scalar_encode(x, centroid, signs, bits, method, self.metric)
        return ScalarCodes(codes, factors, bits, self.dim)

    @cached_property
    def _signs(self) -> np.ndarray | None:
        if not self.rotation:
            return None
        # A legacy generator, whose stream NumPy promises never to change.
        draw = np.random.RandomState(self.seed).randint
        return draw(0, 2, (scalar_checks.ROTATION_ROUNDS, self.dim), dtype=np.uint8)


def scalar_topk(
    queries: ScalarCodes,
    codes: ScalarCodes,
    k: int,
    *,
    mask: Array | None = None,
    ids: Array | None = None,
    ranges: Array | None = None,
) -> tuple[Array, Array]:
    """The k codes of largest score with each query, the score being the inner product of what code and query stand for
    plus the `extra` of both: the estimate of the quantizer's metric.

    The integer products are exact, and the four terms of the score are added in float32 in one order: the same bits
    whatever the instruction set, threads or batch. Results are ordered by descending score, equal scores by id.

    Args:
        queries: `ScalarCodes` of Q queries of the same dim: of `ScalarQuantizer.encode_queries`, or codes like those
            searched (symmetric estimation).
        codes: `ScalarCodes` of N codes of 1 to 8 bits, of the same kind (arrays or tensors) as the queries.
        k: how many codes to return for each query, 1 to N.
        mask, ids, ranges: which codes to search, as for `hamming_topk`.

    Returns:
        (scores float32 [Q, k], ids int64 [Q, k]); an id is a row number of `codes`. Where the filters leave a query
        fewer than k codes, score -inf and id -1 fill its row up.

    Raises:
        TypeError: arrays and tensors are mixed, a wrong type or dtype, or k is no integer.
        ValueError: dims that differ, codes of more than 8 bits, k outside 1..N, or filters that `hamming_topk` refuses.
        IndexError: ids or ranges beyond the rows of `codes`.
    """
    for name, value in (("queries", queries), ("codes", codes)):
        if not isinstance(value, ScalarCodes):
            raise TypeError(f"{name} must be ScalarCodes, got {type(value).__name__}")
    if queries.dim != codes.dim:
        raise ValueError(f"queries must have the {codes.dim} dims of the codes, got {queries.dim}")
    ops = _ops(queries=queries.codes, codes=codes.codes, **_given(mask=mask, ids=ids, ranges=ranges))
    return ops.scalar_topk(
        *(queries.codes, queries.factors, queries.bits, codes.codes, codes.factors, codes.bits),
        *(codes.dim, k, mask, ids, ranges),
    )


def _ops(**inputs: Any) -> Any:
    """The module with the ops for inputs of this kind."""
    return _scalar_codes_torch if are_tensors(**inputs) else _scalar_codes_numpy


def _factors(*columns: Any) -> Any:
    """Columns, arrays or tensors, as float32 [N, 4]."""
    if isinstance(columns[0], np.ndarray):
        return np.stack([column.astype(np.float32) for column in columns], axis=1)
    return _native.torch.stack([column.float() for column in columns], dim=1)


def _like(x: Any, array: np.ndarray | None) -> Any:
    """The array as x is: an array, or a tensor on its device."""
    if array is None or isinstance(x, np.ndarray):
        return array
    return _native.torch.from_numpy(array).to(x.device)


def _as_float64(x: Any) -> np.ndarray:
    return x.astype(np.float64) if isinstance(x, np.ndarray) else x.detach().cpu().double().numpy()
