"""Indexes of binary and few-bit codes: `BinaryIndex` searches every row, `IVFBinaryIndex` the nearest lists."""

import os

from ._file import IndexFileError, read_index_file
from .flat import BinaryIndex
from .ivf import IVFBinaryIndex

__all__ = ["BinaryIndex", "IVFBinaryIndex", "IndexFileError", "load_index"]


def load_index(
    path: str | os.PathLike[str], *, mmap: bool = False, verify: bool | None = None
) -> BinaryIndex | IVFBinaryIndex:
    """The index in a file, whichever class wrote it; arguments and errors are those of `BinaryIndex.load`."""
    settings, _ = read_index_file(path, mapped=True, verified=False)
    cls = IVFBinaryIndex if settings.get("kind") == IVFBinaryIndex.kind else BinaryIndex
    return cls.load(path, mmap=mmap, verify=verify)
