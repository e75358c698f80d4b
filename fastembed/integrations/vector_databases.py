"""One-bit codes in the forms that vector databases take them.

All of them agree with `pack_bits` on what a bit means (set where the dimension is positive) and on their order (the
first dimension in the most significant bit of the first byte), so nothing here is more than a change of type.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .._checks import UINT8, check_array, check_integer
from ..index._inputs import to_numpy
from ..ops import _search_checks as checks


def to_vespa(codes: Any) -> np.ndarray:
    """int8 [N, bytes] for a Vespa field `tensor<int8>(x[bytes])` with `distance-metric: hamming`.

    Args:
        codes: uint8 [N, bytes], as `pack_bits` makes them; an array or a tensor.

    Raises:
        TypeError, ValueError: codes are not as above.
    """
    return _checked(codes, None).view(np.int8)


def to_pgvector(codes: Any, dim: int) -> list[str]:
    """Bit strings such as "0110" for a pgvector column `bit(dim)`, searched by the operator `<~>`.

    Args:
        codes: uint8 [N, ceil(dim / 8)], as `pack_bits` makes them; an array or a tensor.
        dim: dimensions of the vectors.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    digits = np.unpackbits(_checked(codes, dim), axis=1, count=dim) + np.uint8(ord("0"))
    return [row.tobytes().decode("ascii") for row in digits]


def to_pgvector_binary(codes: Any, dim: int) -> list[bytes]:
    """The same values in PostgreSQL's binary format of `bit(dim)`, for COPY ... WITH (FORMAT BINARY): the number of
    bits as a 32-bit big-endian integer, then the bytes of the code.

    Args:
        codes, dim: as for `to_pgvector`.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    rows = _checked(codes, dim)
    length = int(dim).to_bytes(4, "big")
    return [length + row.tobytes() for row in rows]


def to_qdrant(codes: Any, dim: int) -> np.ndarray:
    """float32 [N, dim] of +1 and -1 for a Qdrant collection with `BinaryQuantization`, which packs them again: Qdrant
    takes no packed codes. With distance Dot, a score is dim - 2 times the Hamming distance.

    Args:
        codes, dim: as for `to_pgvector`.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    return 2 * np.unpackbits(_checked(codes, dim), axis=1, count=dim).astype(np.float32) - 1


def _checked(codes: Any, dim: int | None) -> np.ndarray:
    codes = to_numpy("codes", codes)
    if not isinstance(codes, np.ndarray):
        raise TypeError(f"codes must be a NumPy array or a tensor, got {type(codes).__name__}")
    check_array("codes", codes, 2, UINT8)
    if dim is not None:
        check_integer("dim", dim, 1)
        if codes.shape[1] != checks.code_bytes(dim):
            raise ValueError(f"codes must be {checks.code_bytes(dim)} bytes wide for dim {dim}, got {codes.shape[1]}")
    return np.ascontiguousarray(codes)
