"""Indexes of binary and few-bit codes: `BinaryIndex` searches every row, `IVFBinaryIndex` the nearest lists."""

from ._file import IndexFileError
from .flat import BinaryIndex

__all__ = ["BinaryIndex", "IndexFileError"]
